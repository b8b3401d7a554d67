"""Run trials: a method is trained on one few-shot subset and tested as its protocol requires. In a list of trials,
finished ones are skipped, failures are recorded, and the others continue."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.estimate import steps
from dcp_zoo.benchmark.images import GivenFeatures, TrialImages, images_of
from dcp_zoo.benchmark.plan import PROTOCOLS, SAVED_HEADS, Settings, Trial
from dcp_zoo.cluster import LOCAL, ONE_CORE, Event, Resources, run_tasks
from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of
from dcp_zoo.model.checkpoint import WEIGHTS_NAME, library_versions
from dcp_zoo.training.evaluation import Evaluation, expected_calibration_error, negative_log_likelihood, top1
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.methods.base import Classifier, Task
from dcp_zoo.training.methods.table import DCP_METHOD
from dcp_zoo.training.recipes import VALIDATION
from dcp_zoo.training.sources import Progress, no_progress

METRICS = {"top1": top1, "ece": expected_calibration_error, "nll": negative_log_likelihood}


def run_trial(trial: Trial, settings: Settings, progress: Progress = no_progress) -> dict[str, Any]:
    """Train and test: the content of the trial's result file, see `docs/benchmarks.md`. ZooError for missing or damaged
    data, or diverged training."""
    images, recipe, part = images_of(trial, settings), trial.recipe, PROTOCOLS[trial.protocol].parts[0]
    images.progress = progress
    names, texts = images.split(trial.dataset, part).classnames, settings.texts(trial.dataset)
    hashes, train, val = {"split_sha256": images.split(trial.dataset).sha256, "subset_sha256": ""}, None, None
    if trial.shots:
        drawn = trial.dataset, part, trial.shots, trial.seed
        train, val, hashes["subset_sha256"] = images.train(*drawn, recipe.image_augment)
    run = recipe, trial.seed, settings.precision, progress
    task = Task(images.clip, trial.model, names, texts, train, val, *run)
    started = time.perf_counter()
    classifier = METHODS[trial.method].fit(task)
    trained = time.perf_counter()
    results = list(_tests(trial, settings, classifier, names, images))
    if settings.save_heads and trial.method == DCP_METHOD:
        metrics = {f"top1_{entry['stats']}": entry["top1"] for entry in results}
        info = {"dataset": trial.dataset, "shots": trial.shots, "seed": trial.seed, **hashes, **classifier.info}
        info |= {"recipe": task.recipe.training | {"precision": settings.precision}, "metrics": metrics}
        head = METHODS[DCP_METHOD].as_head(classifier, task)
        folder = head.save_pretrained(settings.output / SAVED_HEADS / trial.head, **info)
        hashes["head_sha256"] = sha256_of(folder / WEIGHTS_NAME)
    chosen_on = VALIDATION if METHODS[trial.method].chooses and val is not None else "none"
    return {
        "trial": asdict(trial),
        **settings.conditions(trial),
        "device": str(images.device),
        **hashes,
        "info": classifier.info,
        "selection": classifier.info.get("classifier", classifier.info).get("selection") or chosen_on,
        "results": results,
        "train_seconds": round(trained - started, 2),
        "test_seconds": round(time.perf_counter() - trained, 2),
        "command": settings.command(trial),
        "versions": library_versions(),
    }


def _tests(
    trial: Trial,
    settings: Settings,
    classifier: Classifier,
    classnames: Sequence[str],
    images: TrialImages | GivenFeatures,
) -> Iterator[dict[str, Any]]:
    """One entry per test dataset, part of its classes, and stats."""
    for target in trial.targets or (trial.dataset,):
        for part in PROTOCOLS[trial.protocol].parts:
            names = images.split(target, part).classnames
            if names != classnames:
                classifier.set_classnames(names, settings.texts(target))
                classnames = names
            source = images.test(target, part)
            by_mode = getattr(classifier, "logits_by_mode", None)
            for mode, logits in (by_mode(source) if by_mode else {"": classifier.logits(source)}).items():
                answers = Evaluation(names, source.items, logits)
                entry: dict[str, Any] = {"target": target, "classes": part, "stats": mode}
                for name, metric in METRICS.items():
                    entry[name] = metric(answers.logits, answers.labels)
                entry["images"] = len(answers.labels)
                if settings.per_class:
                    entry["per_class"] = {row.name: round(row.percent, 2) for row in answers.per_class}
                if settings.confusion:
                    entry["confusion"] = answers.confusion_matrix.tolist()
                yield entry


BUSY_SECONDS = 5.0  # before checking again on a trial that another process is running


def execute(trial: Trial, settings: Settings, progress: Progress = no_progress) -> Event:
    """Run one trial, in this process or on a worker, and write its file -> whether it is done, failed (its error is in
    a file), or busy in another process. ZooError if the output folder is not writable, or holds results made with other
    settings."""
    started = time.perf_counter()
    with store.lock(settings.output, trial.key) as acquired:
        if not acquired:
            return Event(trial, "busy")
        if store.finished(trial, settings):
            return Event(trial, "done", "by another process")
        try:
            result = run_trial(trial, settings, progress=progress)
        except Exception as error:  # whatever it is, the other trials can continue
            message = str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {error}"
            store.save_failure(settings, trial, message, traceback.format_exc())
            return Event(trial, "failed", message, seconds=time.perf_counter() - started)
        store.save_result(settings.output, result)
    rows = ((e["target"], e["classes"].replace("all", ""), e["stats"], f"{e['top1']:.2f} %") for e in result["results"])
    accuracies = ", ".join(" ".join(filter(None, row)) for row in rows)
    return Event(trial, "done", accuracies, seconds=time.perf_counter() - started)


def run_in_process(trials: Sequence[Trial], settings: Settings, progress: Progress = no_progress) -> Iterator[Event]:
    for trial in trials:
        yield execute(trial, settings, progress)


def _until_done(run: Callable[..., Iterable[Event]], trials: Sequence[Trial], settings: Settings) -> Iterator[Event]:
    """The events of all trials. Those that another sweep is running are checked again at the end."""
    while trials:
        busy = []
        for event in run(trials, settings):
            yield event
            if event.state == "busy":
                busy.append(event.item)
        if len(busy) == len(trials):
            time.sleep(BUSY_SECONDS)
        trials = busy


# -------------------------------------------------------------------------------------------------------------- on Ray
# One task per trial writes its result to the sweep's folder, which all machines must share, so that if the driver dies,
# only running trials are lost. Workers are reused from trial to trial, with the images they have prepared.


def sweep_on_ray(
    trials: Sequence[Trial], settings: Settings, *, address: str = LOCAL, resources: Resources = ONE_CORE
) -> Iterator[Event]:
    """Run trials on a cluster, see `dcp_zoo.cluster.run_tasks`, and yield their events. Closing it cancels them."""
    work, place = partial(execute, settings=settings), {"options": "--cpus and --gpus", "address": address}
    with closing(run_tasks(work, longest_first(trials), resources, task="one trial", **place)) as tasks:
        for task in tasks:
            yield _event(task, settings)


def longest_first(trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials by training steps: a long one that starts last would keep all other machines waiting. Trials without
    training still come first; they reveal missing files early."""
    return sorted(trials, key=lambda trial: (trial.shots > 0, -steps(trial)))


def _event(task: Event, settings: Settings) -> Event:
    """The event of a trial's task; a trial that is lost for good has failed."""
    if task.state == "lost":
        store.save_failure(settings, task.item, task.message, str(task.result))
        return replace(task, state="failed")
    if task.state != "done":
        return task
    if task.result.state == "done" and task.item.key not in store.done(settings.output):
        raise ZooError(
            f"A worker has finished {task.item.key}, but its result is not in {settings.output}. --output must be a "
            "folder shared by all machines of the cluster."
        )
    return task.result


def sweep(
    trials: Sequence[Trial],
    settings: Settings,
    *,
    run: Callable[[Sequence[Trial], Settings], Iterable[Event]] = run_in_process,
    show: Callable[[Iterable[Event], int], Iterable[Event]] = lambda events, total: events,
) -> dict[Trial, str]:
    """Run all trials that have not finished yet, by `run_in_process` or `sweep_on_ray`. `show` wraps the events to
    display them, given their number. Returns the trials that failed, with their error messages."""
    store.save_plan(settings.output, trials)
    todo = [trial for trial in trials if not store.finished(trial, settings)]
    events = show(_until_done(run, todo, settings), len(todo))
    return {event.item: event.message for event in events if event.state == "failed"}
