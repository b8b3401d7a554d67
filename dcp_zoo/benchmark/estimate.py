"""Estimate the run time of trials from finished ones, or from a short run of their method."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from dcp_zoo.benchmark.plan import PROTOCOLS, Trial
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.data.specs import find_spec
from dcp_zoo.files import format_duration
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import BaseRecipe, Recipe, TrainingRecipe, batch_sizes
from dcp_zoo.zoo.registry import get_spec

FEW, MORE = 5, 15  # classes of a short run


class Cost(NamedTuple):
    """Seconds that a method takes."""

    trial: float
    image: float  # for each training image
    step: tuple[float, float]  # for a training step with `FEW` and with `MORE` classes
    test: float  # for each test image

    def of(self, trial: Trial) -> float | None:
        """The seconds of a trial; None if the size of a dataset is not in the table."""
        specs = [find_spec(name) for name in trial.targets or (trial.dataset,)]
        classes, tested = find_spec(trial.dataset).num_classes, [spec.counts[2] for spec in specs if spec.counts]
        if classes is None or len(tested) < len(specs):
            return None
        step = max(0.0, self.step[0] + (self.step[1] - self.step[0]) / (MORE - FEW) * (classes - FEW))
        modes = 2 if isinstance(trial.recipe, Recipe) else 1  # DCP is tested with stored and with batch statistics
        images = self.image * classes * trial.shots + modes * self.test * sum(tested)
        return self.trial + images + step * steps(trial)


def measured(model: str, method: str, device: str) -> Cost:
    """What a method costs, by short runs on the package's photographs, with random weights of all but its own model."""
    from dcp_zoo.data import Item, Split
    from dcp_zoo.training.device import pick_device
    from dcp_zoo.training.evaluation import EVAL_BATCH, predict
    from dcp_zoo.training.run import plan
    from dcp_zoo.training.sources import image_source
    from dcp_zoo.zoo.factory import plain_clip

    clip = plain_clip(model, with_weights=get_spec(model).clip is None).to(pick_device(device))
    photos, row = sample_images(), METHODS[method]
    published = row.recipe(model, "digits", 1, "few-shot")
    length = next((name for name in ("steps", "epochs") if hasattr(published, name)), "")

    def run(classes: int, times: int = 1) -> tuple[float, float, int]:
        """Seconds of training on an image per class, and of classifying these images; the steps of the training."""
        recipe = published.updated({length: times} if length else {})
        items = [Item(photos[i % len(photos)], str(i), i) for i in range(classes)]
        split = Split("digits", [f"class {i}" for i in range(classes)], items, items)
        task = plan(split, model, method, recipe=recipe, device=device, precision="float32").task(split, clip)
        started = time.perf_counter()
        head = row.fit(task)
        trained = time.perf_counter()
        predict(head, image_source(head.plain.encoder, items), EVAL_BATCH)
        return trained - started, time.perf_counter() - trained, recipe_steps(recipe, classes, 1)

    def parts(classes: int) -> tuple[float, float, float]:
        """Seconds of training besides its steps, of a step, and of classifying."""
        once, tested, count = run(classes)
        step = max(0.0, run(classes, 2)[0] - once) / count if count else 0.0
        return max(0.0, once - step * count), step, tested

    run(FEW)  # slower than the others
    few, step_of_few, _ = parts(FEW)
    more, step_of_more, tested = parts(MORE)
    image = max(0.0, more - few) / (MORE - FEW)
    return Cost(max(0.0, few - FEW * image), image, (step_of_few, step_of_more), tested / MORE)


class TimeEstimator:
    """Estimates from finished results, the content of result files, of the same method, in proportion to the training
    steps. `costs`, by model and method, are for methods without a finished trial."""

    def __init__(self, results: Iterable[dict[str, Any]], costs: Mapping[tuple[str, str], Cost] | None = None) -> None:
        self.costs, self.count = costs or {}, 0
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
        return self.costs[method].of(trial) if method in self.costs else None

    def total(self, trials: Sequence[Trial]) -> float | None:
        """The time for all trials in sequence; None if one has no estimate."""
        times = [self.seconds(trial) for trial in trials]
        return None if None in times else sum(time for time in times if time is not None)

    def describe(self, trials: Sequence[Trial]) -> str:
        """The total time as a sentence, and how it was estimated."""
        known = [trial for trial in trials if self.seconds(trial) is not None]
        unknown = [trial for trial in trials if self.seconds(trial) is None]
        text = ""
        if known:
            finished = f"{self.count} finished trials in this folder" if self.count else ""
            short_runs = "short runs on this machine" if self.costs else ""
            text = f"About {format_duration(self.total(known))} for {len(known)} of them in sequence, estimated from "
            text += f"{' and '.join(filter(None, (finished, short_runs)))}. "
        if unknown:
            what = "trial" if len(unknown) == 1 else "trials"
            text += f"No estimate for {len(unknown)} {what} ({sum(map(steps, unknown)):,} training steps): no trial of "
            text += "the method has finished in this folder, and the size of the data is not known before it is read."
        return text.strip()


def steps(trial: Trial) -> int:
    """Training steps of a trial, from the dataset's number of classes; 0 without training or if it is unknown."""
    classes = find_spec(trial.dataset).num_classes
    if not trial.shots or classes is None:
        return 0
    return recipe_steps(trial.recipe, math.ceil(classes / len(PROTOCOLS[trial.protocol].parts)), trial.shots)


def recipe_steps(recipe: BaseRecipe, classes: int, shots: int) -> int:
    """Training steps with a recipe; an epoch of a method without batches is one."""
    if not isinstance(recipe, TrainingRecipe):
        return getattr(recipe, "steps", getattr(recipe, "epochs", 0))
    images = classes * shots
    return len(batch_sizes(images, recipe.batch_size, recipe.drop_last)) * recipe.fitted(images, classes).num_epochs
