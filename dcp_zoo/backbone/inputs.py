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
    """A batch of images in one of the forms below, with some of the methods of tensors."""

    x: Tensor  # (B, ...)

    def __len__(self) -> int:
        return len(self.x)

    def _each(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        """With all tensors changed."""
        return replace(self, **{name: change(t) for name, t in vars(self).items() if isinstance(t, Tensor)})

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        return self._each(lambda t: t.to(*args, **kwargs))

    def split(self: Self, size: int) -> Sequence[Self]:
        starts = range(0, len(self), size)
        return [self._each(lambda t, start=start: t[start : start + size]) for start in starts]  # type: ignore[misc]

    def pin_memory(self: Self, *args: Any) -> Self:  # DataLoader calls it
        return self._each(lambda t: t.pin_memory(*args))


class Pixels(Inputs):
    """Images (B, 3, H, W), normalised as `create_transform` does."""


@dataclass(frozen=True)
class Tokens(Inputs):
    """What enters the blocks of a frozen image tower: tokens (B, N, Dv)."""

    seen: Tensor | None = None  # (B, V), what `VisionTower.read` gives of the stem before the blocks

    def packed(self) -> Tensor:
        """One row per image (B, N Dv + V), as they are stored."""
        return torch.cat([self.x.flatten(1), *([] if self.seen is None else [self.seen])], 1)

    @classmethod
    def unpacked(cls, rows: Tensor, shape: tuple[int, int]) -> "Tokens":
        """The tokens of `packed` rows, of the shape (N, Dv)."""
        size = math.prod(shape)
        return cls(rows[:, :size].unflatten(1, shape), rows[:, size:] if rows.shape[1] > size else None)


class Features(Inputs):
    """What leaves a frozen image tower: its features (B, E), or also those of its backbone (B, E + V)."""


Images = Tensor | Inputs


def as_inputs(images: Images) -> Inputs:
    return Pixels(images) if isinstance(images, Tensor) else images
