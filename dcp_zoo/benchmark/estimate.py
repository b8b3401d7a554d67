"""How long trials may take, from what finished ones took."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from dcp_zoo.benchmark.trial import Trial, default_of
from dcp_zoo.data.table import find_spec
from dcp_zoo.training.recipes import TrainingRecipe


class Clock:
    """Estimates from finished results: of like trials, or by training steps from the same method's others.

    Args:
        results: the content of result files.
    """

    def __init__(self, results: Iterable[dict[str, Any]]) -> None:
        self.alike: dict[tuple, list[float]] = defaultdict(list)
        self.training: dict[tuple, list[float]] = defaultdict(list)  # seconds a step
        self.testing: dict[tuple, list[float]] = defaultdict(list)
        for result in results:
            trial = Trial.from_dict(result["trial"])
            self.alike[_alike(trial)].append(result["train_seconds"] + result["test_seconds"])
            self.training[_method(trial)].append(result["train_seconds"] / max(1, steps(trial)))
            self.testing[_method(trial)].append(result["test_seconds"])

    def seconds(self, trial: Trial) -> float | None:
        """The estimate; None where the method has no finished trial with this model."""
        if _alike(trial) in self.alike:
            return mean(self.alike[_alike(trial)])
        if _method(trial) not in self.training:
            return None
        return mean(self.training[_method(trial)]) * max(1, steps(trial)) + mean(self.testing[_method(trial)])

    def total(self, trials: Sequence[Trial]) -> float | None:
        """All of them, one after the other; None if one is unknown."""
        times = [self.seconds(trial) for trial in trials]
        return None if None in times else sum(time for time in times if time is not None)

    def explain(self, trials: Sequence[Trial]) -> str:
        """The total in words, and where it comes from."""
        known = [trial for trial in trials if self.seconds(trial) is not None]
        unknown = len(trials) - len(known)
        count = sum(len(times) for times in self.alike.values())
        words = []
        if known:
            words.append(
                f"About {in_words(self.total(known))} for {len(known)} of them, one after the other, from the times of "
                f"{count} finished trials in this folder (others of a method by their training steps)."
            )
        if unknown:
            what = "trial" if unknown == 1 else "trials"
            words.append(
                f"No estimate for {unknown} {what}, {steps_of(trials, self)} training steps: nothing of their methods "
                "is finished in this folder. Run one of each first, such as --shots 1 --seeds 1."
            )
        return " ".join(words)


def steps_of(trials: Sequence[Trial], clock: Clock) -> str:
    """Training steps of the trials that the clock knows nothing of."""
    return f"{sum(steps(trial) for trial in trials if clock.seconds(trial) is None):,}"


def steps(trial: Trial) -> int:
    """Training steps of a trial, from the table's number of classes; 0 where there are none, or it is not known."""
    recipe, classes = default_of(trial).updated(dict(trial.options)), find_spec(trial.dataset).num_classes
    if not isinstance(recipe, TrainingRecipe) or not trial.shots or classes is None:
        return 0
    if trial.protocol == "base-to-new":
        classes = (classes + 1) // 2
    return max(1, classes * trial.shots // recipe.batch_size) * recipe.num_epochs


def in_words(seconds: float | None) -> str:
    """90 -> "2 min"; None -> "?"."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _alike(trial: Trial) -> tuple:
    return (trial.protocol, trial.model, trial.dataset, trial.method, trial.options, trial.shots)


def _method(trial: Trial) -> tuple:
    return (trial.model, trial.method)
