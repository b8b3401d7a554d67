"""Training recipes: plain numbers, each with its help text, and the sources of their defaults."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from dcp_zoo.data.packaged import find_spec
from dcp_zoo.errors import check_range
from dcp_zoo.features import MANY
from dcp_zoo.fields import Checked, Values, check, count, option, problems
from dcp_zoo.heads.config import PHRASE, DCPConfig
from dcp_zoo.zoo.specs import get_spec

TEXT_PROBE = "text-probe"
# what hyperparameters were chosen on; cross-validation is on the training images
VALIDATION, CROSS_VALIDATION = "few-shot validation images", "cross-validation"
EXAMPLES_UNUSED = "The {} images of none of the classes are not used: {}."
# the default beside the paper's: a schedule that fits the training set, clip_reg with CLIP, and a text probe
FITTED_SCHEDULE: Values = {"epochs": None, "drop_last": False, "clip_reg": 1.0, "classifier": TEXT_PROBE}
FEWEST_STEPS, MIN_EPOCHS = 100, 5
# changes to `Recipe` in the authors' two recipes: their released code, and their paper with that code's
# other numbers
PAPER: Values = {"ctx_init": PHRASE}
AUTHORS = {"release": PAPER | {"coupling": "text_to_vision"}, "paper": PAPER}
TRANSFER = 4  # times DCP's clip_reg, for what it was not trained on
IMAGENET_EPOCHS = 5  # of DCP's schedule of 20, which its script of tests on other datasets loads
R = TypeVar("R", bound="BaseRecipe")


def check_seed(seed: int) -> None:
    """ZooError unless NumPy can draw from it, too."""
    check_range("The seed", seed, 0, 2**32 - 1)


def batch_sizes(images: int, batch_size: int, drop_last: bool) -> list[int]:
    """Sizes of the shuffled batches of an epoch. With `drop_last` an incomplete batch is dropped, unless it
    is the only one; otherwise every image is in a batch, and the sizes differ by at most one."""
    if drop_last or images <= batch_size:
        return [min(images, batch_size)] * max(1, images // batch_size)
    count = -(-images // batch_size)
    return [images // count + (i < images % count) for i in range(count)]


def steps_needed(images: int, classes: int, batch_size: int) -> int:
    """Optimiser steps of a schedule that fits the training set, chosen on validation images, see
    `benchmarks/notes.md`: one for two images and two for each class, at least `FEWEST_STEPS`, and up to
    `MANY` images never less than the release's 20 epochs. Beyond, further images need no further steps: they
    replace repetitions."""
    counted = min(images, MANY)
    return max(FEWEST_STEPS, counted // 2 + 2 * classes, 20 * counted // batch_size)


@dataclass(frozen=True)
class BaseRecipe(Checked):
    """The hyperparameters of one method, and the classifier that is fitted after it. `is_trained` says
    whether `loop.train` trains by it: with callbacks, and a state from which it resumes."""

    is_trained = False
    by_protocol: ClassVar[Mapping[str, Values]] = {}  # published values, where they depend on it, but for few-shot
    augment: str = option(
        "none",
        "augmentation of training images: random crops and flips, only flips, or none",
        choices=("crop-flip", "flip", "none"),
    )
    classifier: str = option(
        "none", "fitted on image features after training: text-probe, or none", choices=("none", TEXT_PROBE)
    )

    def __init_subclass__(cls, **defaults: object) -> None:
        """The keywords of a class that extends this one are other defaults of its fields."""
        for name, default in defaults.items():
            inherited = cls.__dataclass_fields__[name]
            cls.__annotations__[name] = inherited.type
            setattr(cls, name, field(default=default, metadata=inherited.metadata))

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "BaseRecipe":
        """The published values for a task with at least one image per class; by default those of the
        fields, or `by_protocol`."""
        return cls(**cls.by_protocol.get(protocol, {}))

    def with_epochs(self, images: int, classes: int) -> "BaseRecipe":
        """This recipe for a training set; the same, unless its length depends on that."""
        return self

    def updated(self: R, changes: Mapping[str, Any], where: str = "the recipe") -> R:
        """A copy with some fields changed; ZooError for an unknown field or a value that it cannot have."""
        check(where, problems(changes, type(self)))
        return replace(self, **changes)

    @property
    def training(self) -> Values:
        """What a checkpoint stores of it."""
        return self.as_dict()


@dataclass(frozen=True)
class TrainingRecipe(BaseRecipe, augment="crop-flip"):
    """How prompts are trained. The defaults are those of DCP's authors."""

    is_trained = True
    optimizer: str = option("sgd", "the optimizer", choices=("sgd", "adamw", "adam"))
    lr: float = option(0.0035, "peak learning rate, reached in epoch 1 and followed by a cosine towards 0")
    warmup_lr: float = option(1e-5, "learning rate of epoch 0")
    momentum: float = option(0.9, "momentum of sgd")
    weight_decay: float = option(5e-4, "L2 penalty of sgd and adam, decoupled weight decay of adamw")
    batch_size: int = count(4, "images per step, at most")
    drop_last: bool = option(True, "drop an incomplete batch of an epoch; false: batches of near-equal size, no drop")
    epochs: int | None = count(20, "length of the schedule; null: as many as the number of classes and images needs")
    stop_epoch: int | None = count(None, "end after this many epochs of the schedule")

    def with_epochs(self, images: int, classes: int) -> "TrainingRecipe":
        """This recipe for a training set: for `epochs` None, with as many as give the `steps_needed`."""
        if self.epochs is not None:
            return self
        per_epoch = len(batch_sizes(images, self.batch_size, self.drop_last))
        steps = steps_needed(images, classes, self.batch_size)
        return replace(self, epochs=max(MIN_EPOCHS, -(-steps // per_epoch)))

    @property
    def num_epochs(self) -> int:
        """Number of epochs that are run, by a recipe `with_epochs`."""
        assert self.epochs is not None
        return min(self.epochs, self.stop_epoch or self.epochs)

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; it is constant within an epoch."""
        assert self.epochs is not None
        if epoch == 0:
            return self.warmup_lr
        return self.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2


@dataclass(frozen=True)
class Recipe(TrainingRecipe, DCPConfig):
    """How a DCP head is trained: options of model and training, by default the paper's with the numbers of
    its code."""

    eval_batch_size: int = count(16, "images per batch when batch statistics are evaluated")
    clip_reg: float = option(0.0, "weight of the distance to zero-shot CLIP's features in the loss; 1: as in PromptSRC")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "Recipe":
        """The default recipe; where it agrees with zero-shot CLIP, more so for classes and styles that it
        was not trained on. From ImageNet, transfer is measured after `IMAGENET_EPOCHS`: this reads the
        authors' scripts, which disagree on it."""
        default = default_recipe(model, dataset)
        if protocol == "few-shot":
            return default
        stop = IMAGENET_EPOCHS if dataset == "imagenet" and default.epochs else None
        return replace(default, clip_reg=TRANSFER * default.clip_reg, stop_epoch=stop)

    @property
    def config(self) -> DCPConfig:
        """The model's options."""
        return DCPConfig(**{part.name: getattr(self, part.name) for part in fields(DCPConfig)})

    @property
    def training(self) -> Values:
        """All other fields: a checkpoint stores the model's options on their own."""
        return {name: value for name, value in self.as_dict().items() if name not in DCPConfig.__dataclass_fields__}


def default_recipe(model: str, dataset: str | None = None) -> Recipe:
    """For CLIP models on the paper's datasets the recipe "paper" and the text probe, for the zoo's planned
    heads, too; otherwise its values with the changes of the model's row in the registry, and a schedule that
    fits the training set. `dataset=None` counts as one of them. The coupling is the paper's because it is
    the method as described."""
    changes = get_spec(model).recipe
    if not changes and (dataset is None or find_spec(dataset).counts):
        return Recipe(**AUTHORS["paper"], classifier=TEXT_PROBE)
    return Recipe(**(FITTED_SCHEDULE | changes))
