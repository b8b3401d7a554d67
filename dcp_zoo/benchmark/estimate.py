"""Estimate the run time of trials from finished ones, or from step times measured before."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from dcp_zoo.benchmark.trial import Trial
from dcp_zoo.data.table import find_spec
from dcp_zoo.files import format_duration
from dcp_zoo.training.recipes import TrainingRecipe, batch_sizes

Times = tuple[Sequence[float], Sequence[float]]  # numbers of classes, and seconds with so many


class TimeEstimator:
    """Estimates from finished results of the same method, in proportion to the training steps.

    Args:
        results: the content of result files.
        step_times: by model, for DCP before any trial has finished: see `seconds_by_steps`.
    """

    def __init__(self, results: Iterable[dict[str, Any]], step_times: Mapping[str, Times] | None = None) -> None:
        self.step_times, self.count = step_times or {}, 0
        self.training: dict[tuple, list[float]] = defaultdict(list)  # seconds per step
        self.testing: dict[tuple, list[float]] = defaultdict(list)
        for self.count, result in enumerate(results, start=1):
            trial = Trial.from_dict(result["trial"])
            self.training[trial.model, trial.method].append(result["train_seconds"] / max(1, steps(trial)))
            self.testing[trial.model, trial.method].append(result["test_seconds"])

    def seconds(self, trial: Trial) -> float | None:
        """The estimate; None if there is none."""
        method = trial.model, trial.method
        if method in self.training:
            return mean(self.training[method]) * max(1, steps(trial)) + mean(self.testing[method])
        times = self.step_times.get(trial.model)
        return None if times is None else seconds_by_steps(trial, times)

    def total(self, trials: Sequence[Trial]) -> float | None:
        """The time for all trials in sequence; None if one has no estimate."""
        times = [self.seconds(trial) for trial in trials]
        return None if None in times else sum(time for time in times if time is not None)

    def describe(self, trials: Sequence[Trial]) -> str:
        """The total time as a sentence, and how it was estimated."""
        known = [trial for trial in trials if self.seconds(trial) is not None]
        unknown = [trial for trial in trials if self.seconds(trial) is None]
        sentences = []
        if known:
            sentences.append(
                f"About {format_duration(self.total(known))} for {len(known)} of them in sequence, estimated from "
                f"{self.count} finished trials in this folder."
            )
        if unknown:
            what = "trial" if len(unknown) == 1 else "trials"
            sentences.append(
                f"No estimate for {len(unknown)} {what} ({sum(map(steps, unknown)):,} training steps): their methods "
                "have no finished trial in this folder. Run one of each first, such as --shots 1 --seeds 1."
            )
        return " ".join(sentences)


def seconds_by_steps(trial: Trial, step: Times) -> float | None:
    """An upper bound for DCP before any trial has finished, from times of a training step of 4 images: a test image,
    without backward pass, counts as a quarter of it. None if the dataset's size is not in the table."""
    spec = find_spec(trial.dataset)
    if not (spec.counts and spec.num_classes):
        return None
    import numpy as np  # here, as `--dry-run` starts faster without it

    modes = 2 if trial.method == "dcp" else 1
    return (steps(trial) + modes * spec.counts[2] / 4) * float(np.interp(spec.num_classes, *step))


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
