"""One transformer block taken apart, so that attention can read tokens that the block does not rewrite.

Attention is computed from a block's parameters where the block itself cannot do it: with prompts that are only attended
to, with classes that share one prefix, and in the last block, where only the pooled tokens need a query. A family of
blocks says where its parameters are: `open_clip_vit.OpenClipBlock`, `timm_vit.TimmBlock`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

KeyValue = tuple[torch.Tensor, torch.Tensor]  # each (..., H, L, d)


class Block:
    """One block: x + out(attention(norm(x))), then the MLP. It holds the module, and no parameters of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., L, D) -> what attention reads (..., L, D)."""
        raise NotImplementedError

    def query(self, normed: torch.Tensor, rotate: bool = True) -> torch.Tensor:
        """normed (..., L, D) -> queries (..., H, L, d). Without `rotate`, the tokens have no position."""
        raise NotImplementedError

    def key_value(self, normed: torch.Tensor, rotate: bool = True) -> KeyValue:
        """normed (..., L, D) -> keys and values, each (..., H, L, d); `rotate` as in `query`."""
        raise NotImplementedError

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the block: x (..., L, D), attended (..., H, L, d) -> (..., L, D)."""
        raise NotImplementedError

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The whole block: x (B, L, D) -> (B, L, D). `mask` is True where a query may attend to a key."""
        normed = self.norm(x)
        key, value = self.key_value(normed)
        return self.finish(x, F.scaled_dot_product_attention(self.query(normed), key, value, mask))


def call(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return function(*args)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., L, D) -> (..., heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(..., heads, L, d) -> (..., L, heads d)."""
    return x.transpose(-3, -2).flatten(-2)
