"""How a method is trained: the recipe's numbers, its learning rates, and its optimizer."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import check_choice

if TYPE_CHECKING:
    from typing_extensions import Self

OPTIMIZERS = ("sgd", "adamw")
AUGMENTS = ("crop-flip", "flip", "none")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseRecipe:
    """The numbers of one method; `updated` changes some of them.

    Attributes:
        augment: of the training images: "crop-flip" (bicubic random resized crop and flip), "flip" (test transform and
            flip) or "none".
    """

    augment: str = "none"

    def __post_init__(self) -> None:
        check_choice("augment", self.augment, AUGMENTS)

    def updated(self, changes: dict[str, Any], where: str = "the command line") -> "Self":
        """A copy with some parts changed; ZooError names the parts there are if one is unknown or of a wrong type."""
        types = {f.name: type(getattr(self, f.name)) for f in fields(self)}
        unknown = sorted(changes.keys() - types)
        if unknown:
            raise ZooError(f"{where} sets unknown parts {', '.join(unknown)}: a recipe has {', '.join(types)}.")
        for name, value in changes.items():
            kind = types[name]
            fits = isinstance(value, (int, float)) if kind is float else value is None or isinstance(value, kind)
            if kind is not type(None) and not fits:
                raise ZooError(f"{where} sets {name} to {value!r}, which is not a {kind.__name__}.")
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrainingRecipe(BaseRecipe):
    """How prompts are trained. The defaults are the DCP release's.

    Attributes:
        lr: peak learning rate, reached in epoch 1 and followed by a cosine towards 0 at `epochs`.
        warmup_lr: learning rate of epoch 0.
        batch_size: images a step, of all processes together; the last incomplete batch of an epoch is dropped if there
            is a complete one.
        epochs: length of the schedule.
        stop_epoch: end after this many epochs of it, as the release does with 5 of 20 on ImageNet. None: all.
    """

    augment: str = "crop-flip"
    optimizer: str = "sgd"
    lr: float = 0.0035
    warmup_lr: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 4
    epochs: int = 20
    stop_epoch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def num_epochs(self) -> int:
        """Epochs that are really run."""
        return min(self.epochs, self.stop_epoch or self.epochs)

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; it is set once an epoch."""
        if epoch == 0:
            return self.warmup_lr
        return self.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2

    def build_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """How a DCP head is trained. The defaults are the DCP release's recipe.

    Attributes:
        coupling, n_ctx, depth, fusing, shared, ctx_init: of the model, see `DCP`.
        eval_batch_size: images that share a context where `context="batch"` is evaluated.
    """

    coupling: str = "bidirectional"
    n_ctx: int = 16
    depth: int = 9
    fusing: str = "mean"
    shared: bool = True
    ctx_init: str | None = None
    eval_batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_batch_size < 1:
            raise ZooError(f"eval_batch_size must be at least 1, not {self.eval_batch_size}.")

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments of `create_model` among the recipe's parts."""
        return {k: getattr(self, k) for k in ("coupling", "n_ctx", "depth", "fusing", "shared", "ctx_init")}


def read_recipe(path: str | Path, base: Recipe) -> Recipe:
    """`base` with the changes of a small YAML file such as `epochs: 50`.

    Raises:
        ZooError: no such file, not YAML, or parts that a recipe does not have.
    """
    try:
        changes = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise ZooError(f"There is no recipe file {path}.") from error
    except yaml.YAMLError as error:
        raise ZooError(f"The recipe {path} is not YAML: {error}") from error
    if not isinstance(changes, dict):
        raise ZooError(f"The recipe {path} must be lines of `name: value`, such as `epochs: 50`.")
    return base.updated(changes, where=str(path))
