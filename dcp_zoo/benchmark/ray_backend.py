"""A sweep on a Ray cluster: one task per trial.

Each task writes its result to the sweep's folder, which all machines must share, so that if the driver dies, only
running trials are lost. Workers are reused from trial to trial, with the images they have prepared.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.estimate import steps
from dcp_zoo.benchmark.sweep import BUSY_SECONDS, Event, execute
from dcp_zoo.benchmark.trial import Settings, Trial
from dcp_zoo.cluster import LOCAL, ONE_CORE, Resources, TaskEvent, run_tasks
from dcp_zoo.errors import ZooError


def sweep_on_ray(
    trials: Sequence[Trial], settings: Settings, *, address: str = LOCAL, resources: Resources = ONE_CORE
) -> Iterator[Event]:
    """Run trials on a cluster and yield their events. Closing the generator cancels running trials.

    Args:
        trials: the trials to run.
        settings: its folders must be the same on all machines.
        address: see `dcp_zoo.cluster.connected`.
        resources: of each trial.

    Raises:
        ZooError: Ray is not installed or cannot be reached, or no machine of the cluster is large enough for a trial.
    """
    tasks = run_tasks(
        partial(execute, settings=settings),
        longest_first(trials),
        resources,
        task="one trial",
        options="--cpus and --gpus",
        address=address,
        again=lambda outcome: BUSY_SECONDS if outcome.state == "busy" else 0,
    )
    with closing(tasks):
        for task in tasks:
            yield _event(task, settings)


def longest_first(trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials by training steps: a long one that starts last would keep all other machines waiting.

    Trials without training still come first; they reveal missing files early.
    """
    return sorted(trials, key=lambda trial: (trial.shots > 0, -steps(trial)))


def _event(task: TaskEvent, settings: Settings) -> Event:
    """The event of a trial's task; a trial that is lost for good has failed."""
    trial = task.item
    if task.state == "lost":
        store.save_failure(settings, trial, task.message, str(task.result))
        return Event(trial, "failed", task.message)
    if task.state != "done":
        return Event(trial, task.state, task.message)
    if task.result.state == "done" and trial.key not in store.done(settings.output):
        raise ZooError(
            f"A worker has finished {trial.key}, but its result is not in {settings.output}. --output must be a folder "
            "shared by all machines of the cluster."
        )
    return task.result
