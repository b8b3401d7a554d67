"""Run one trial: a method, trained on one few-shot subset and tested as its protocol requires."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dcp_zoo.benchmark.images import GivenFeatures, TrialImages, images_of
from dcp_zoo.benchmark.trial import SAVED_HEADS, Settings, Trial
from dcp_zoo.files import sha256_of
from dcp_zoo.model.checkpoint import WEIGHTS_NAME, library_versions
from dcp_zoo.training.device import seed_everything
from dcp_zoo.training.evaluation import Evaluation, expected_calibration_error, negative_log_likelihood, top1
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.methods.base import Classifier, Task
from dcp_zoo.training.methods.table import DCP_METHOD
from dcp_zoo.training.recipes import VALIDATION
from dcp_zoo.training.sources import Progress, no_progress

CLASS_PARTS = {"base-to-new": ("base", "new")}  # of the classes, that are tested apart


def run_trial(trial: Trial, settings: Settings, progress: Progress = no_progress) -> dict[str, Any]:
    """Train and test.

    Returns:
        The content of the trial's result file, see `docs/benchmarks.md`.

    Raises:
        ZooError: missing or damaged data, or diverged training.
    """
    images = images_of(trial, settings)
    images.progress = progress
    task, hashes = trial_task(trial, settings, images)
    seed_everything(trial.seed)
    started = time.perf_counter()
    classifier = METHODS[trial.method].fit(task)
    trained = time.perf_counter()
    results = list(_tests(trial, settings, classifier, task.classnames, images))
    if settings.save_heads and trial.method == DCP_METHOD:
        metrics = {f"top1_{entry['stats']}": entry["top1"] for entry in results}
        info = {"dataset": trial.dataset, "shots": trial.shots, "seed": trial.seed, **hashes, **classifier.info}
        info |= {"recipe": task.recipe.training | {"precision": settings.precision}, "metrics": metrics}
        head = METHODS[DCP_METHOD].as_head(classifier, task)
        hashes["head_sha256"] = sha256_of(
            head.save_pretrained(settings.output / SAVED_HEADS / trial.head, **info) / WEIGHTS_NAME
        )
    chosen_on = VALIDATION if METHODS[trial.method].chooses and task.val is not None else "none"
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


def trial_task(trial: Trial, settings: Settings, images: TrialImages | GivenFeatures) -> tuple[Task, dict[str, Any]]:
    """The method's task, and hashes that identify its images."""
    recipe, part = trial.recipe, CLASS_PARTS.get(trial.protocol, ("all",))[0]
    classnames = images.split(trial.dataset, part).classnames
    hashes = {"split_sha256": images.split(trial.dataset).sha256, "subset_sha256": ""}
    train, val = None, None
    if trial.shots:
        drawn = trial.dataset, part, trial.shots, trial.seed
        train, val, hashes["subset_sha256"] = images.train(*drawn, recipe.image_augment)
    task = Task(
        images.clip,
        trial.model,
        classnames,
        settings.texts(trial.dataset),
        train,
        val,
        recipe,
        trial.seed,
        settings.precision,
        images.progress,
    )
    return task, hashes


def _tests(
    trial: Trial,
    settings: Settings,
    classifier: Classifier,
    classnames: Sequence[str],
    images: TrialImages | GivenFeatures,
) -> Iterator[dict[str, Any]]:
    """One entry per test dataset, part of its classes, and stats."""
    for target in trial.targets or (trial.dataset,):
        for part in CLASS_PARTS.get(trial.protocol, ("all",)):
            names = images.split(target, part).classnames
            if names != classnames:
                classifier.set_classnames(names, settings.texts(target))
                classnames = names
            source = images.test(target, part)
            by_mode = getattr(classifier, "logits_by_mode", None)
            for mode, logits in (by_mode(source) if by_mode else {"": classifier.logits(source)}).items():
                entry = {"target": target, "classes": part, "stats": mode}
                yield entry | _measure(Evaluation(names, source.items, logits), settings)


def _measure(evaluation: Evaluation, settings: Settings) -> dict[str, Any]:
    logits, labels = evaluation.logits, evaluation.labels
    entry: dict[str, Any] = {
        "top1": top1(logits, labels),
        "ece": expected_calibration_error(logits, labels),
        "nll": negative_log_likelihood(logits, labels),
        "images": len(labels),
    }
    if settings.per_class:
        entry["per_class"] = {row.name: round(row.percent, 2) for row in evaluation.per_class}
    if settings.confusion:
        entry["confusion"] = evaluation.confusion_matrix.tolist()
    return entry
