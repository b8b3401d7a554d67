"""What is trained, and on which images: all that is decided, and checked, before any work starts. `train`,
`FewShotClassifier.fit`, `benchmark` and `build` all plan a `Run`, which alone makes a `Task`."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item, Split, few_shot, find_spec, is_own
from dcp_zoo.data.images import Progress, no_progress
from dcp_zoo.data.seen import image_hashes
from dcp_zoo.data.splits import subset_sha256, warn_of_numbers
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.training.device import pick_device, pick_precision
from dcp_zoo.training.loop import Callback
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.table import DCP_METHOD, DEFAULT_METHOD, RecipeLike, chosen_recipe
from dcp_zoo.training.recipes import AUTO, MANY, PROBE_REFUSED, BaseRecipe, check_seed
from dcp_zoo.training.sources import ImageSource, image_source
from dcp_zoo.zoo.encoders import check_encoders, load_encoders
from dcp_zoo.zoo.registry import SIZES

ClassWeights = str | Mapping[Any, float] | None
# of items, augmentation, and whether they are read once: `image_source`, or in a sweep what trials share
Reader = Callable[[Sequence[Item], str, bool], ImageSource]


@dataclass(frozen=True)
class Run:
    """What is trained, and on which images."""

    model: str  # in the zoo, such as "dcp_vitb16"
    split: Split  # the full dataset, from which the few-shot subset is drawn
    shots: int | None  # training images per class; None uses all
    seed: int  # of the subset, of initial weights and of the order of the images
    recipe: BaseRecipe  # the method's, see `chosen_recipe`
    device: torch.device
    method: str = DCP_METHOD
    precision: str = "float32"
    workers: int = 0  # processes that decode images
    descriptions: Texts | None = None  # what CLIP reads of each class. Default: the dataset's template
    test_share: float | None = None  # of the images, held out for the test, if not the default; for the record
    class_weight: tuple[float, ...] | None = None  # of each class in the text probe. Default: all 1
    sample_weight: tuple[float, ...] | None = None  # of each training image in the text probe. Default: all 1
    encoders: tuple[str, ...] = ()  # image models of timm that the text probe reads beside CLIP

    def subset(self) -> Split:
        """The split with the training images that are used: drawn by shots and seed, or all."""
        return self.split if self.shots is None else few_shot(self.split, self.shots, self.seed)

    def task(
        self, subset: Split, clip: FrozenCLIP, progress: Progress = no_progress, read: Reader | None = None
    ) -> Task:
        """What the method is given: the images of `subset`, for a CLIP on the run's device."""
        method = METHODS[self.method]

        def images(items: Sequence[Item], augment: str, once: bool) -> ImageSource:
            return image_source(clip, items, augment, self.workers, progress, once, self.precision)

        read = read or images
        augment = self.recipe.image_augment if len(subset.train) <= MANY else self.recipe.augment
        needed = method.needs_images(self.recipe)
        return Task(
            clip,
            self.model,
            subset.classnames,
            self.descriptions or find_spec(self.split.name).template,
            read(subset.train, augment, method.features) if needed else None,
            read(subset.val, "none", True) if needed and subset.val else None,
            self.recipe,
            self.seed,
            self.precision,
            progress,
            probe_weights=self._probe_weights(subset),
            none=read(subset.none, "none", True) if subset.none else None,
            encoders=load_encoders(self.encoders, clip),
        )

    def _probe_weights(self, subset: Split) -> torch.Tensor | None:
        """Weights (n,) of the training images in the text probe: those of the images times those of their classes."""
        if self.class_weight is None and self.sample_weight is None:
            return None
        labels = torch.tensor([item.label for item in subset.train])
        images = torch.tensor(self.sample_weight or [1.0] * len(labels))
        return images if self.class_weight is None else images * torch.tensor(self.class_weight)[labels]

    @property
    def is_probe_alone(self) -> bool:
        """Whether nothing but a text probe is fitted to the training images."""
        return self.recipe.classifier != "none" and not METHODS[self.method].trains

    def info(self, subset: Split) -> Values:
        """What a checkpoint stores about how it was trained, on the training images of `subset`."""
        recipe = self.recipe.fitted(len(subset.train), len(subset.classnames))
        stored: Values = {
            "dataset": self.split.name,
            "shots": self.shots,
            "seed": self.seed,
            "split_sha256": self.split.sha256,
            "subset_sha256": subset_sha256(subset.train),
        }
        if is_own(self.split.name):
            counts = Counter(item.label for item in subset.train)
            stored["class_images"] = {name: counts[label] for label, name in enumerate(subset.classnames)}
            stored["image_hashes"] = image_hashes(subset.train + subset.val)
        if self.split.unreadable:
            stored["unreadable_images"] = self.split.unreadable
        if subset.none:
            stored["none_sha256"] = subset_sha256(subset.none)
        if self.test_share is not None:
            stored["test_share"] = self.test_share
        stored["recipe"] = recipe.training | {"precision": self.precision}
        if self.class_weight is not None:
            stored["class_weight"] = list(self.class_weight)
        return stored


def plan(
    split: Split,
    model: str,
    method: str = DCP_METHOD,
    *,
    shots: int | None = None,
    seed: int = 1,
    recipe: RecipeLike = None,
    classifier: str | None = None,
    changes: Mapping[str, object] | None = None,
    device: str = "auto",
    precision: str = AUTO,
    class_weight: ClassWeights = None,
    labels: Sequence[object] | None = None,
    encoder: str | Sequence[str] | None = None,
    **options: Any,
) -> Run:
    """A run on the images of a split, with all other inputs checked before any work starts.

    Args:
        split, model, method, shots, seed: see `Run`.
        recipe, classifier: see `chosen_recipe`.
        changes: to the recipe, as of `--set`.
        device, precision: see `pick_device` and `pick_precision`.
        class_weight: weights by label, or "balanced", of a text probe alone; see `dcp_zoo.train`.
        labels: of the classes, if not their names.
        encoder: image models of timm, by name, that the text probe reads beside CLIP; see `dcp_zoo.zoo.encoders`.
        options: further attributes of `Run`.
    """
    check_seed(seed)
    model, place = SIZES.get(model, model), pick_device(device)
    precision = pick_precision(precision, model, place)
    per_class = shots or max(1, len(split.train) // len(split.classnames))
    fitting = chosen_recipe(method, model, split.name, per_class, recipe, classifier)
    fitting = fitting.updated(changes or {}, where="--set")
    if fitting.classifier != "none" and METHODS[method].abilities.fitted:
        raise ZooError(PROBE_REFUSED.format(method))
    if is_own(split.name) and not options.get("descriptions"):
        warn_of_numbers(split.classnames)
    encoders = (encoder,) if isinstance(encoder, str) else tuple(encoder or ())
    if encoders and fitting.classifier == "none":
        raise ZooError("An image encoder is read by the text probe: choose --classifier text-probe, or omit --encoder.")
    check_encoders(encoders)
    run = Run(model, split, shots, seed, fitting, place, method, precision, encoders=encoders, **options)
    for name, weight in (("class_weight", class_weight), ("sample_weight", run.sample_weight)):
        if weight is not None and not run.is_probe_alone:
            raise ZooError(f"{method} does not support {name}: choose method={DEFAULT_METHOD!r}.")
    if class_weight is None:
        return run
    return replace(run, class_weight=_class_weights(class_weight, labels or split.classnames))


def _class_weights(class_weight: ClassWeights, labels: Sequence[object]) -> tuple[float, ...] | None:
    """The weights of the classes with these labels; None for "balanced", which a text probe always is."""
    if not isinstance(class_weight, Mapping):
        check_choice("class_weight", class_weight, ("balanced",))
        return None
    if unknown := sorted(map(str, class_weight.keys() - set(labels))):
        raise ZooError(f"class_weight names unknown classes: {', '.join(unknown)}.")
    weights = tuple(float(class_weight.get(label, 1)) for label in labels)
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ZooError("class_weight takes finite numbers of at least 0, not all 0.")
    return weights


def check_supported(run: Run, callbacks: Sequence[Callback]) -> None:
    """ZooError for callbacks of a method that does not train by epochs."""
    if callbacks and not run.recipe.is_trained:
        able = [name for name in METHODS if METHODS[name].recipe(run.model, run.split.name, 1, "few-shot").is_trained]
        raise ZooError(f"{run.method} does not support callbacks: choose from {', '.join(able)}.")
