"""Run a list of trials: finished ones are skipped, failures are recorded, and the others continue."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.estimate import steps
from dcp_zoo.benchmark.run import run_trial
from dcp_zoo.benchmark.trial import Settings, Trial
from dcp_zoo.cluster import LOCAL, ONE_CORE, Resources, TaskEvent, run_tasks
from dcp_zoo.errors import ZooError
from dcp_zoo.training.sources import Progress, no_progress

BUSY_SECONDS = 5.0  # before checking again on a trial that another process is running


@dataclass(frozen=True)
class Event:
    """What has become of a trial: "done", "failed", "busy" if another process is running it, or "waiting" for another
    attempt after its worker was lost."""

    trial: Trial
    state: str
    message: str = ""
    seconds: float = 0.0


def execute(trial: Trial, settings: Settings, progress: Progress = no_progress) -> Event:
    """Run one trial, in this process or on a worker, and write its file -> whether it is done, failed or busy.

    Raises:
        ZooError: the output folder is not writable, or holds results made with other settings. Errors of the trial
            itself are recorded in a file under `failed`.
    """
    started = time.perf_counter()
    with store.lock(settings.output, trial.key) as acquired:
        if not acquired:
            return Event(trial, "busy")
        if store.finished(settings.output, trial, settings):
            return Event(trial, "done", "by another process")
        try:
            result = run_trial(trial, settings, progress=progress)
        except Exception as error:  # whatever it is, the other trials can continue
            message = str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {error}"
            store.save_failure(settings, trial, message, traceback.format_exc())
            return Event(trial, "failed", message, time.perf_counter() - started)
        store.save_result(settings.output, result)
    return Event(trial, "done", _accuracies(result), time.perf_counter() - started)


def _accuracies(result: dict[str, Any]) -> str:
    return ", ".join(
        f"{' '.join(filter(None, (e['target'], e['classes'].replace('all', ''), e['stats'])))} {e['top1']:.2f} %"
        for e in result["results"]
    )


def run_in_process(trials: Sequence[Trial], settings: Settings, progress: Progress = no_progress) -> Iterator[Event]:
    """Run trials in sequence."""
    for trial in trials:
        yield execute(trial, settings, progress)


def _until_done(run: Callable[..., Iterable[Event]], trials: Sequence[Trial], settings: Settings) -> Iterator[Event]:
    """The events of all trials. Those that another sweep is running are checked again at the end."""
    while trials:
        busy = []
        for event in run(trials, settings):
            yield event
            if event.state == "busy":
                busy.append(event.trial)
        if len(busy) == len(trials):
            time.sleep(BUSY_SECONDS)
        trials = busy


# -------------------------------------------------------------------------------------------------------------- on Ray
# One task per trial writes its result to the sweep's folder, which all machines must share, so that if the driver dies,
# only running trials are lost. Workers are reused from trial to trial, with the images they have prepared.


def sweep_on_ray(
    trials: Sequence[Trial], settings: Settings, *, address: str = LOCAL, resources: Resources = ONE_CORE
) -> Iterator[Event]:
    """Run trials on a cluster and yield their events. Closing the generator cancels the others.

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


# -------------------------------------------------------------------------------------------------------- all trials


def sweep(
    trials: Sequence[Trial],
    settings: Settings,
    *,
    run: Callable[[Sequence[Trial], Settings], Iterable[Event]] = run_in_process,
    show: Callable[[Iterable[Event], int], Iterable[Event]] = lambda events, total: events,
) -> dict[Trial, str]:
    """Run all trials that have not finished yet.

    Args:
        trials: the complete list.
        settings: shared by all trials.
        run: the back end: `run_in_process` or `sweep_on_ray`.
        show: wraps the events to display them, given the number of trials.

    Returns:
        The trials that failed, with their error messages.

    Raises:
        ZooError: the output folder is not writable, or holds results made with other settings.
    """
    store.save_plan(settings.output, trials)
    todo = [trial for trial in trials if not store.finished(settings.output, trial, settings)]
    events = show(_until_done(run, todo, settings), len(todo))
    return {event.trial: event.message for event in events if event.state == "failed"}
