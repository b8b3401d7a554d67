"""Images in the forms in which a model takes them: pixels, the tokens or the features that were computed
from them. A plain tensor is pixels."""

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
    """A batch of images in one of the forms below, with some of the methods of tensors, for all it holds."""

    x: Tensor  # (B, ...)

    def __len__(self) -> int:
        return len(self.x)

    def _each(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{name: change(t) for name, t in vars(self).items() if isinstance(t, Tensor)})

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        return self._each(lambda t: t.to(*args, **kwargs))

    def split(self: Self, size: int) -> Sequence[Self]:
        starts = range(0, len(self), size)
        return [self._each(lambda t, start=start: t[start : start + size]) for start in starts]  # type: ignore[misc]


class Pixels(Inputs):
    """Images (B, 3, H, W), normalised as `create_transform` does."""


@dataclass(frozen=True)
class Tokens(Inputs):
    """What enters the blocks of a frozen image tower: tokens (B, N, Dv)."""

    stem: Tensor | None = None  # (B, V), features of the miniature's stem before the blocks, see `VisionTower.read`

    def packed(self) -> Tensor:
        """One row per image (B, N Dv + V), as they are stored."""
        rows = self.x.flatten(1)
        return rows if self.stem is None else torch.cat([rows, self.stem], 1)

    @classmethod
    def unpacked(cls, rows: Tensor, shape: tuple[int, int]) -> "Tokens":
        """The tokens of `packed` rows, of the shape (N, Dv)."""
        size = math.prod(shape)
        return cls(rows[:, :size].unflatten(1, shape), rows[:, size:] if rows.shape[1] > size else None)


class Features(Inputs):
    """What leaves a frozen image tower: CLIP's embedding (B, E), or with its `extra` features (B, E + V)."""


Images = Tensor | Inputs


def as_inputs(images: Images) -> Inputs:
    return Pixels(images) if isinstance(images, Tensor) else images
