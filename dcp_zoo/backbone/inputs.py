"""What a model reads of images, as far as it has been computed: a tensor alone is pixels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Inputs")
VIEW_BATCH = 32  # images whose activations fit into 0.5 GB


@dataclass(frozen=True)
class Inputs:
    """A batch of images in one of the forms below."""

    x: Tensor  # (B, ...)

    def __len__(self) -> int:
        return len(self.x)

    def _each(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        """With all tensors changed."""
        return replace(self, **{name: change(t) for name, t in vars(self).items() if isinstance(t, Tensor)})

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """As `Tensor.to`."""
        return self._each(lambda t: t.to(*args, **kwargs))

    def split(self: Self, size: int) -> Sequence[Self]:
        """As `Tensor.split`."""
        starts = range(0, len(self), size)
        return [self._each(lambda t, start=start: t[start : start + size]) for start in starts]  # type: ignore[misc]

    def pin_memory(self: Self, *args: Any) -> Self:
        """As `Tensor.pin_memory`: DataLoader calls it."""
        return self._each(lambda t: t.pin_memory(*args))


class Pixels(Inputs):
    """Images (B, 3, H, W), normalised as `create_transform` does."""


@dataclass(frozen=True)
class Maps(Inputs):
    """What leaves a frozen patch embedding: maps (B, Dv, h, w), without positions."""

    backbone: Tensor | None = None  # (B, V), see `VisionTower.backbone_width`, where the embedding computes it


@dataclass(frozen=True)
class Tokens(Inputs):
    """What enters a block of a frozen image tower: tokens (B, N, Dv)."""

    block: int = 0
    backbone: Tensor | None = None  # as of `Maps`


def packed(inputs: Maps | Tokens) -> Tensor:
    """What is read of each image as one row (B, X + V), as it is stored."""
    return torch.cat([inputs.x.flatten(1), *([] if inputs.backbone is None else [inputs.backbone])], 1)


def unpacked(rows: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """x (B, *shape) and the backbone of `packed` rows."""
    size = math.prod(shape)
    return rows[:, :size].unflatten(1, tuple(shape)), rows[:, size:] if rows.shape[1] > size else None


class Features(Inputs):
    """What leaves a frozen image tower: its features (B, E), or also those of its backbone (B, E + V)."""


Images = Tensor | Inputs


def as_inputs(images: Images) -> Inputs:
    return Pixels(images) if isinstance(images, Tensor) else images
