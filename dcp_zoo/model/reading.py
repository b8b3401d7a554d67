"""What a classifier reads of images, and where it starts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcp_zoo.model.clip import FrozenCLIP, Linear
from dcp_zoo.model.inputs import Images


@dataclass(frozen=True)
class Reading:
    """Features of an encoder, and the logits that a classifier on them starts at."""

    encoder: FrozenCLIP  # whose weights a method may have changed
    encode: Callable[[Images], Tensor]  # images, in any form -> normalised features (B, E)
    start: Callable[[], Linear]  # logits (B, C) by these features: weight (C, E) and bias (C,)
    prompts: Callable[[], list[Tensor]] | None = None  # (M, Dv), that enter its blocks; None if there are none

    @property
    def is_prompted(self) -> bool:
        """Whether the features depend on more than the encoder's weights."""
        return self.prompts is not None


def joined(features: Sequence[Tensor]) -> Tensor:
    """Normalised features f_r (B, E) of R readings -> [f_1, .., f_R] / sqrt(R), which has the length 1, too."""
    return torch.cat(list(features), -1) / math.sqrt(len(features)) if len(features) > 1 else features[0]


def join(linears: Sequence[Linear]) -> Linear:
    """The mean of linear functions of each reading's features, as one of the `joined` ones."""
    if len(linears) == 1:
        return linears[0]
    weights, biases = zip(*linears, strict=True)
    return torch.cat(weights, 1) / math.sqrt(len(weights)), torch.stack(biases).mean(0)
