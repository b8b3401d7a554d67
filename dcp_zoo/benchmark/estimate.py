"""How much work trials are: their training steps, and the time, estimated from finished ones."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean

from dcp_zoo.benchmark.plan import PROTOCOLS, Trial
from dcp_zoo.data.specs import find_spec
from dcp_zoo.fields import Values
from dcp_zoo.files import format_duration
from dcp_zoo.training.recipes import TrainingRecipe, batch_sizes


def steps(trial: Trial) -> int:
    """Training steps of a trial, from the dataset's number of classes; 0 without training or if it is unknown. An epoch
    of a method without batches is one."""
    recipe, classes = trial.recipe, find_spec(trial.dataset).num_classes
    if not trial.shots or classes is None:
        return 0
    if not isinstance(recipe, TrainingRecipe):
        return getattr(recipe, "steps", getattr(recipe, "epochs", 0))
    classes = math.ceil(classes / len(PROTOCOLS[trial.protocol].parts))
    images = classes * trial.shots
    return len(batch_sizes(images, recipe.batch_size, recipe.drop_last)) * recipe.fitted(images, classes).num_epochs


def describe(trials: Sequence[Trial], results: Iterable[Values]) -> str:
    """The training steps of trials as a sentence; and the time of those whose method has finished results, the content
    of result files, in proportion to the steps."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)  # seconds of a step, and of the test
    for result in results:
        done = Trial.from_dict(result["trial"])
        times = result["train_seconds"] / max(1, steps(done)), result["test_seconds"]
        found[done.model, done.method].append(times)
    text = f"{sum(map(steps, trials)):,} training steps."
    known, seconds = [trial for trial in trials if (trial.model, trial.method) in found], 0.0
    for trial in known:
        step, test = map(mean, zip(*found[trial.model, trial.method], strict=True))
        seconds += step * max(1, steps(trial)) + test
    if known:
        text += f" About {format_duration(seconds)} for {len(known)} trials in sequence, estimated from finished ones."
    return text
