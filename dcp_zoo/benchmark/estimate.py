"""Estimate the run time of trials from finished ones, or from step times measured before."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dcp_zoo.benchmark.trial import Trial
from dcp_zoo.data.table import find_spec
from dcp_zoo.training.recipes import TrainingRecipe, batch_sizes


class TimeEstimator:
    """Estimates from finished results: of trials that differ only in the seed, or else, in proportion to the training
    steps, of the method's other trials.

    Args:
        results: the content of result files.
    """

    def __init__(self, results: Iterable[dict[str, Any]]) -> None:
        self.by_setup: dict[tuple, list[float]] = defaultdict(list)
        self.training: dict[tuple, list[float]] = defaultdict(list)  # seconds per step
        self.testing: dict[tuple, list[float]] = defaultdict(list)
        for result in results:
            trial = Trial.from_dict(result["trial"])
            self.by_setup[_setup(trial)].append(result["train_seconds"] + result["test_seconds"])
            self.training[_method(trial)].append(result["train_seconds"] / max(1, steps(trial)))
            self.testing[_method(trial)].append(result["test_seconds"])

    def seconds(self, trial: Trial) -> float | None:
        """The estimate; None if the method has no finished trial with this model."""
        if _setup(trial) in self.by_setup:
            return mean(self.by_setup[_setup(trial)])
        if _method(trial) not in self.training:
            return None
        return mean(self.training[_method(trial)]) * max(1, steps(trial)) + mean(self.testing[_method(trial)])

    def total(self, trials: Sequence[Trial]) -> float | None:
        """The time for all trials in sequence; None if one has no estimate."""
        times = [self.seconds(trial) for trial in trials]
        return None if None in times else sum(time for time in times if time is not None)

    def describe(self, trials: Sequence[Trial]) -> str:
        """The total time as a sentence, and how it was estimated."""
        known = [trial for trial in trials if self.seconds(trial) is not None]
        unknown = [trial for trial in trials if self.seconds(trial) is None]
        count = sum(len(times) for times in self.by_setup.values())
        sentences = []
        if known:
            sentences.append(
                f"About {format_duration(self.total(known))} for {len(known)} of them in sequence, estimated from "
                f"{count} finished trials in this folder."
            )
        if unknown:
            what = "trial" if len(unknown) == 1 else "trials"
            sentences.append(
                f"No estimate for {len(unknown)} {what} ({sum(map(steps, unknown)):,} training steps): their methods "
                "have no finished trial in this folder. Run one of each first, such as --shots 1 --seeds 1."
            )
        return " ".join(sentences)


def measured_times(
    path: Path, model: str, task: str, variant: str, batch: int, column: str = "seconds"
) -> tuple[list[int], list[float]]:
    """Numbers of classes and times of the rows of a CSV file by `benchmarks/speed.py`, for interpolation."""
    with path.open() as file:
        rows = [
            row for row in csv.DictReader(file) if (row["task"], row["model"], row["variant"]) == (task, model, variant)
        ]
    found = sorted((int(row["classes"]), float(row[column])) for row in rows if int(row["batch"]) == batch)
    return [classes for classes, _ in found], [seconds for _, seconds in found]


class MeasuredSpeed:
    """Estimates for DCP before any trial has finished, from the times of a step and an image on one machine.

    Args:
        path: a CSV file by `benchmarks/speed.py`.
        model: a model of the zoo.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.step = measured_times(path, model, "training", "ours", 4)
        self.images = measured_times(path, model, "inference", "unfused", 16)

    def seconds(self, trial: Trial) -> float | None:
        """The estimate; None if nothing was measured for the model, or the dataset's size is not in the table."""
        spec = find_spec(trial.dataset)
        if not (self.step[0] and self.images[0] and spec.counts and spec.num_classes):
            return None
        import numpy as np  # here, as `--dry-run` starts faster without it

        modes = 2 if trial.method == "dcp" else 1
        image = float(np.interp(spec.num_classes, *self.images)) / 16
        return steps(trial) * float(np.interp(spec.num_classes, *self.step)) + modes * spec.counts[2] * image


class GivenSpeed(MeasuredSpeed):
    """Upper estimates from the seconds of one step, of four images: a test image counts as a quarter of a step, whose
    backward pass it does without."""

    def __init__(self, step: float) -> None:
        self.step, self.images = ([1], [step]), ([1], [16 * step / 4])


def steps(trial: Trial) -> int:
    """Training steps of a trial, from the dataset's number of classes; 0 without training or if it is unknown."""
    recipe, classes = trial.recipe, find_spec(trial.dataset).num_classes
    if not isinstance(recipe, TrainingRecipe) or not trial.shots or classes is None:
        return 0
    if trial.protocol == "base-to-new":
        classes = (classes + 1) // 2
    images = classes * trial.shots
    per_epoch = len(batch_sizes(images, recipe.batch_size, recipe.drop_last))
    return per_epoch * recipe.fitted(images, classes).num_epochs


def format_duration(seconds: float | None) -> str:
    """90 -> "2 min"; None -> "?"."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _setup(trial: Trial) -> tuple:
    """Everything but the seed."""
    return (trial.protocol, trial.model, trial.dataset, trial.method, trial.options, trial.shots)


def _method(trial: Trial) -> tuple:
    return (trial.model, trial.method)
