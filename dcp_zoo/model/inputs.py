"""What a model reads of images, as far as it has been computed: a tensor alone is pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

Self = TypeVar("Self", bound="Inputs")


@dataclass(frozen=True)
class Inputs:
    """A batch of images in one of the forms below."""

    x: Tensor  # (B, ...)

    def __len__(self) -> int:
        return len(self.x)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """As `Tensor.to`."""
        return replace(self, x=self.x.to(*args, **kwargs))

    def split(self: Self, size: int) -> Sequence[Self]:
        """As `Tensor.split`."""
        return [replace(self, x=part) for part in self.x.split(size)]

    def pin_memory(self: Self, *args: Any) -> Self:
        """As `Tensor.pin_memory`: DataLoader calls it."""
        return replace(self, x=self.x.pin_memory(*args))


class Pixels(Inputs):
    """Images (B, 3, H, W), normalised as `create_transform` does."""


class Maps(Inputs):
    """What leaves a frozen patch embedding: maps (B, Dv, h, w), without positions."""


@dataclass(frozen=True)
class Tokens(Inputs):
    """What enters a block of a frozen image tower: tokens (B, N, Dv)."""

    block: int = 0


class Features(Inputs):
    """What leaves a frozen image tower: normalised features (B, E)."""


Images = Tensor | Inputs


def as_inputs(images: Images) -> Inputs:
    return Pixels(images) if isinstance(images, Tensor) else images
