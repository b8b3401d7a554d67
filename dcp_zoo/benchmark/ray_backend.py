"""A sweep on a Ray cluster: one task a trial.

Each task writes its own result into the sweep's folder, which all machines must share; so the death of the driver loses
only what was under way. Workers are kept from trial to trial, with the images that they have prepared.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.estimate import steps
from dcp_zoo.benchmark.sweep import BUSY_SECONDS, Event, Outcome, Settings, Trial, execute
from dcp_zoo.errors import ZooError, import_extra

LOCAL = "local"
POLL_SECONDS = 1.0
CONNECT_SECONDS = 10
LOCAL_STARTS = 3


@dataclass(frozen=True)
class Resources:
    """What one trial is given.

    Attributes:
        cpus: processor cores; torch takes as many threads.
        gpus: 0.5 puts two trials on a GPU. None: 1 where the cluster has GPUs, else 0.
        retries: new attempts after the death of a worker, a lost machine, or a lack of memory.
    """

    cpus: float = 1
    gpus: float | None = None
    retries: int = 2


def run_on_ray(
    trials: Sequence[Trial], settings: Settings, *, address: str = LOCAL, resources: Resources = Resources()
) -> Iterator[Event]:
    """Run trials on a cluster and tell what happens to them. Closing the generator cancels what is under way.

    Args:
        trials: what to run.
        settings: the folders in it must be the same on all machines.
        address: of the cluster, such as "10.0.0.1:6379", or "auto" on one of its machines; "local" starts one here.
        resources: what each trial is given.

    Raises:
        ZooError: Ray is missing or not reached, or no machine of the cluster is large enough for one trial.
    """
    ray, started_here = connect(address)
    try:
        resources = _fitted(ray, resources)
        yield from _drive(ray, longest_first(trials), _absolute(settings), resources)
    finally:
        if started_here:
            ray.shutdown()


def longest_first(trials: Sequence[Trial]) -> list[Trial]:
    """Trials by their training steps: a long one that starts last would keep all other machines waiting.

    What trains nothing still comes first; it shows early whether all is in place.
    """
    return sorted(trials, key=lambda trial: (trial.shots > 0, -steps(trial)))


def connect(address: str, **local: Any) -> tuple[Any, bool]:
    """The ray module, connected, and whether this call connected it; `local` are `ray.init`'s options for "local"."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = import_extra("ray", "cluster")
    if ray.is_initialized():
        return ray, False
    try:
        _check_reachable(address)
        _init(ray, address, {"include_dashboard": False} | local if address == LOCAL else {})
    except Exception as error:  # Ray raises all kinds, plain Exception among them
        raise ZooError(
            f"No Ray cluster at {address!r}: {error}. Start one with `ray start --head`, or take --ray local."
        ) from error
    return ray, True


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Connect; a local start has another try, as Ray gives it only 30 seconds, too little for a busy machine."""
    for attempt in range(LOCAL_STARTS if address == LOCAL else 1):
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
            return
        except Exception:
            ray.shutdown()
            if attempt == LOCAL_STARTS - 1 or address != LOCAL:
                raise


def _check_reachable(address: str) -> None:
    """OSError where nothing answers: Ray itself would try for minutes, and then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _absolute(settings: Settings) -> Settings:
    """Workers have another working directory."""
    root = settings.data_root
    return replace(settings, output=Path(settings.output).absolute(), data_root=root and Path(root).absolute())


def _fitted(ray: Any, resources: Resources) -> Resources:
    """The resources with the number of GPUs settled; ZooError if no machine has that much."""
    if resources.gpus is None:
        resources = replace(resources, gpus=float("GPU" in ray.cluster_resources()))
    if slots(ray, resources) == 0:
        have = "; ".join(f"{n.get('CPU', 0):g} cores, {n.get('GPU', 0):g} GPUs" for n in _machines(ray))
        raise ZooError(
            f"No machine of the cluster has {resources.cpus:g} cores and {resources.gpus:g} GPUs for one trial (there "
            f"are: {have or 'none'}). Ask for less with --cpus and --gpus."
        )
    return resources


def _machines(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def slots(ray: Any, resources: Resources) -> int:
    """How many trials the machines that are alive hold at once."""
    needs = {name: n for name, n in (("CPU", resources.cpus), ("GPU", resources.gpus)) if n}
    return sum(min(int(machine.get(name, 0) / n) for name, n in needs.items()) for machine in _machines(ray))


def _drive(ray: Any, waiting: list[Trial], settings: Settings, resources: Resources) -> Iterator[Event]:
    """Keep as many tasks under way as there is room for; what Ray queues itself could not be told from what runs."""
    task = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_calls=0,  # else a worker with a GPU would end after each trial
        max_retries=0,  # retries are counted here, where they can be shown
    )(execute)
    running: dict[Any, Trial] = {}
    busy: dict[Trial, float] = {}  # when to look again
    losses: Counter[Trial] = Counter()
    try:
        while waiting or busy or running:
            waiting += [trial for trial, due in busy.items() if due <= time.monotonic()]
            busy = {trial: due for trial, due in busy.items() if due > time.monotonic()}
            while waiting and len(running) < max(1, slots(ray, resources)):
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
    """What became of a task."""
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ZooError) else error) from None  # the sweep cannot go on
    except ray.exceptions.RayError as error:
        losses[trial] += 1
        message = _reason(ray, error)
        if losses[trial] <= resources.retries:
            return Event(trial, "waiting", f"{message}; attempt {losses[trial] + 1} of {resources.retries + 1} follows")
        message = f"{message}, {losses[trial]} times"
        store.save_failure(settings.output, trial, message, str(error))
        return Event(trial, "failed", message)
    if outcome.state == "done" and trial.key not in store.done(settings.output):
        raise ZooError(
            f"A worker has finished {trial.key}, but its result is not in {settings.output}: --output must be a folder "
            "that all machines of the cluster share."
        )
    return Event(trial, outcome.state, outcome.message, outcome.seconds)


def _reason(ray: Any, error: Exception) -> str:
    """Why Ray lost a task, in a few words."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "the machine ran out of memory and its worker was ended (more --cpus a trial: fewer at once)"
    if isinstance(error, (ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError)):
        return "its machine was lost"
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return "its worker died"
    return f"Ray lost it ({type(error).__name__})"
