"""Run a list of trials: finished ones are skipped, failures are recorded, and the others continue."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.run import run_trial
from dcp_zoo.benchmark.trial import Settings, Trial
from dcp_zoo.errors import ZooError
from dcp_zoo.training.sources import Progress, no_progress

BUSY_SECONDS = 5.0  # before checking again on a trial that another process is running


@dataclass(frozen=True)
class Event:
    """A change of a trial's state: "running", "waiting" for another attempt, "done", "failed", or "busy" if another
    process is running it."""

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
    """Run trials in sequence. Those that another sweep is running are checked again at the end."""
    waiting = list(trials)
    while waiting:
        busy = []
        for trial in waiting:
            yield Event(trial, "running")
            event = execute(trial, settings, progress)
            yield event
            if event.state == "busy":
                busy.append(trial)
        if len(busy) == len(waiting):
            time.sleep(BUSY_SECONDS)
        waiting = busy


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
        run: the back end: `run_in_process` or `ray_backend.sweep_on_ray`.
        show: wraps the events to display them, given the number of trials.

    Returns:
        The trials that failed, with their error messages.

    Raises:
        ZooError: the output folder is not writable, or holds results made with other settings.
    """
    store.save_plan(settings.output, trials)
    todo = [trial for trial in trials if not store.finished(settings.output, trial, settings)]
    return {event.trial: event.message for event in show(run(todo, settings), len(todo)) if event.state == "failed"}
