"""A sweep on a Ray cluster: one task per trial.

Each task writes its result to the sweep's folder, which all machines must share, so that if the driver dies, only
running trials are lost. Workers are reused from trial to trial, with the images they have prepared.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.estimate import steps
from dcp_zoo.benchmark.sweep import BUSY_SECONDS, Event, Outcome, execute
from dcp_zoo.benchmark.trial import Settings, Trial
from dcp_zoo.cluster import LOCAL, check_fits, connect, slots
from dcp_zoo.errors import ZooError

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Resources:
    """The resources of one trial.

    Attributes:
        cpus: CPU cores, also the number of torch's threads.
        gpus: 0.5 puts two trials on a GPU. None: 1 if the cluster has GPUs, else 0.
        retries: further attempts after a worker died, a machine was lost, or memory was exhausted.
    """

    cpus: float = 1
    gpus: float | None = None
    retries: int = 2


def run_on_ray(
    trials: Sequence[Trial], settings: Settings, *, address: str = LOCAL, resources: Resources = Resources()
) -> Iterator[Event]:
    """Run trials on a cluster and yield their events. Closing the generator cancels running trials.

    Args:
        trials: the trials to run.
        settings: its folders must be the same on all machines.
        address: of the cluster, such as "10.0.0.1:6379", or "auto" on one of its machines; "local" starts one here.
        resources: of each trial.

    Raises:
        ZooError: Ray is not installed or cannot be reached, or no machine of the cluster is large enough for a trial.
    """
    ray, started_here = connect(address)
    try:
        resources = _resolved(ray, resources)
        yield from _drive(ray, longest_first(trials), _absolute(settings), resources)
    finally:
        if started_here:
            ray.shutdown()


def longest_first(trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials by training steps: a long one that starts last would keep all other machines waiting.

    Trials without training still come first; they reveal missing files early.
    """
    return sorted(trials, key=lambda trial: (trial.shots > 0, -steps(trial)))


def _absolute(settings: Settings) -> Settings:
    """The settings with absolute paths: workers have another working directory."""
    root = settings.data_root
    return replace(settings, output=Path(settings.output).absolute(), data_root=root and Path(root).absolute())


def _resolved(ray: Any, resources: Resources) -> Resources:
    """The resources with a definite number of GPUs; ZooError if no machine has enough."""
    if resources.gpus is None:
        resources = replace(resources, gpus=float("GPU" in ray.cluster_resources()))
    check_fits(ray, resources.cpus, resources.gpus or 0, "one trial", "--cpus and --gpus")
    return resources


def _drive(ray: Any, waiting: list[Trial], settings: Settings, resources: Resources) -> Iterator[Event]:
    """Keep as many tasks running as fit; tasks queued in Ray could not be distinguished from running ones."""
    task = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_calls=0,  # otherwise a worker with a GPU would exit after each trial
        max_retries=0,  # retries are counted here, where they can be displayed
    )(execute)
    running: dict[Any, Trial] = {}
    busy: dict[Trial, float] = {}  # when to check again
    losses: Counter[Trial] = Counter()
    try:
        while waiting or busy or running:
            waiting += [trial for trial, due in busy.items() if due <= time.monotonic()]
            busy = {trial: due for trial, due in busy.items() if due > time.monotonic()}
            while waiting and len(running) < max(1, slots(ray, resources.cpus, resources.gpus or 0)):
                trial = waiting.pop(0)
                running[task.remote(trial, settings)] = trial
                yield Event(trial, "running")
            for reference in ray.wait(list(running), timeout=POLL_SECONDS)[0] if running else _pause():
                trial = running.pop(reference)
                event = _event(ray, reference, trial, settings, losses, resources)
                if event.state == "busy":
                    busy[trial] = time.monotonic() + BUSY_SECONDS
                if event.state == "waiting":
                    waiting.append(trial)
                yield event
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _pause() -> list:
    time.sleep(POLL_SECONDS)
    return []


def _event(
    ray: Any, reference: Any, trial: Trial, settings: Settings, losses: Counter[Trial], resources: Resources
) -> Event:
    """The event for a task that has ended."""
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ZooError) else error) from None  # the sweep cannot continue
    except ray.exceptions.RayError as error:
        losses[trial] += 1
        message = _reason(ray, error)
        if losses[trial] <= resources.retries:
            return Event(trial, "waiting", f"{message}; attempt {losses[trial] + 1} of {resources.retries + 1} follows")
        message = f"{message}, {losses[trial]} times"
        store.save_failure(settings.output, trial, settings.command(trial), message, str(error))
        return Event(trial, "failed", message)
    if outcome.state == "done" and trial.key not in store.done(settings.output):
        raise ZooError(
            f"A worker has finished {trial.key}, but its result is not in {settings.output}. --output must be a folder "
            "shared by all machines of the cluster."
        )
    return Event(trial, outcome.state, outcome.message, outcome.seconds)


def _reason(ray: Any, error: Exception) -> str:
    """Why Ray lost a task, in a few words."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "the machine ran out of memory and its worker was killed (more --cpus per trial run fewer at once)"
    if isinstance(error, (ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError)):
        return "its machine was lost"
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return "its worker died"
    return f"Ray lost it ({type(error).__name__})"
