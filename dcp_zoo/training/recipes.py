"""Training recipes: plain numbers, each with its help text, and the sources of their defaults."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import yaml

from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import DCPConfig, check_options, option
from dcp_zoo.zoo.registry import get_spec

if TYPE_CHECKING:
    from typing_extensions import Self

OPTIMIZERS = ("sgd", "adamw")
AUGMENTS = ("crop-flip", "flip", "none")
AUGMENT_HELP = "augmentation of training images: random crops and flips, only flips, or none"
PRECISIONS = ("float32", "bfloat16", "float16")
HEAD_RECIPES = Path(__file__).parent / "head_recipes"  # a YAML file for each dataset with a recipe of its own
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True)
class BaseRecipe:
    """The hyperparameters of one method. Raises ZooError for an unknown choice."""

    augment: str = option("none", AUGMENT_HELP, AUGMENTS)

    def __post_init__(self) -> None:
        check_options(self)

    def updated(self, changes: Mapping[str, Any], where: str = "--set") -> "Self":
        """A copy with some fields changed; ZooError for an unknown field or a value of the wrong type."""
        hints = get_type_hints(type(self))
        names = [part.name for part in fields(self)]
        unknown = sorted(changes.keys() - set(names))
        if unknown:
            raise ZooError(f"{where} sets unknown fields {', '.join(unknown)}: a recipe has {', '.join(names)}.")
        for name, value in changes.items():
            types = get_args(hints[name]) or (hints[name],)
            if not isinstance(value, (*types, int) if float in types else types):
                raise ZooError(f"{where} sets {name} to {value!r}: it must be {TYPE_NAMES[types[0]]}.")
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrainingRecipe(BaseRecipe):
    """How prompts are trained. The defaults are the DCP release's."""

    augment: str = option("crop-flip", AUGMENT_HELP, AUGMENTS)
    optimizer: str = option("sgd", "the optimizer", OPTIMIZERS)
    lr: float = option(0.0035, "peak learning rate, reached in epoch 1 and followed by a cosine towards 0")
    warmup_lr: float = option(1e-5, "learning rate of epoch 0")
    momentum: float = option(0.9, "momentum of sgd")
    weight_decay: float = option(5e-4, "L2 penalty of sgd, decoupled weight decay of adamw")
    batch_size: int = option(4, "images per step over all processes; an incomplete batch is dropped, if not the only")
    epochs: int = option(20, "length of the schedule")
    stop_epoch: int | None = option(None, "end after this many epochs of the schedule")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def num_epochs(self) -> int:
        """Number of epochs that are run."""
        return min(self.epochs, self.stop_epoch or self.epochs)

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; it is constant within an epoch."""
        if epoch == 0:
            return self.warmup_lr
        return self.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2


@dataclass(frozen=True)
class Recipe(TrainingRecipe, DCPConfig):
    """How a DCP head is trained: options of the model and hyperparameters of its training, by default the release's."""

    eval_batch_size: int = option(16, "images that share a context when the batch context is evaluated")

    def __post_init__(self) -> None:
        DCPConfig.__post_init__(self)
        TrainingRecipe.__post_init__(self)
        if self.eval_batch_size < 1:
            raise ZooError(f"eval_batch_size must be at least 1, not {self.eval_batch_size}.")

    @property
    def config(self) -> DCPConfig:
        """The model's options."""
        return DCPConfig(**{part.name: getattr(self, part.name) for part in fields(DCPConfig)})

    @property
    def training(self) -> dict[str, Any]:
        """All other fields, as plain values."""
        return {name: value for name, value in self.as_dict().items() if name not in DCPConfig.__dataclass_fields__}


def default_recipe(model: str, dataset: str | None = None) -> Recipe:
    """The release's recipe with the changes of the model's row in the registry, then of `head_recipes/DATASET.yaml`."""
    recipe = Recipe(**get_spec(model).recipe)
    changes = HEAD_RECIPES / f"{dataset}.yaml"
    return read_recipe(changes, recipe) if changes.is_file() else recipe


def read_recipe(path: str | Path, base: Recipe) -> Recipe:
    """`base` with the changes of a small YAML file such as `epochs: 50`.

    Raises:
        ZooError: no such file, invalid YAML, or fields that a recipe does not have.
    """
    try:
        changes = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise ZooError(f"There is no recipe file {path}.") from error
    except yaml.YAMLError as error:
        raise ZooError(f"The recipe {path} is not valid YAML: {error}") from error
    if not isinstance(changes, dict):
        raise ZooError(f"The recipe {path} must consist of lines `name: value`, such as `epochs: 50`.")
    return base.updated(changes, where=str(path))
