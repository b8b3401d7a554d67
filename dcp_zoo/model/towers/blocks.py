"""One transformer block, computed from its parameters in steps, so that attention can read tokens that the block does
not rewrite.

The block itself could not do this: attend to prompts without computing them, share one prefix between classes, and in
the last block compute only the pooled tokens. A family of
blocks says where its parameters are: `open_clip_vit.OpenClipBlock`, `timm_vit.TimmBlock`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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

    def prompts(self, prompts: torch.Tensor) -> KeyValue:
        """Prompts (M, D), which have no position, as they enter the block -> their keys and values (H, M, d)."""
        return self.key_value(self.norm(prompts), rotate=False)

    def __call__(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
        given: KeyValue | None = None,
        rows: int | None = None,
    ) -> torch.Tensor:
        """The whole block: x (B, L, D) -> its first `rows` tokens after the block (B, rows, D), by default all.

        Args:
            x: the tokens.
            mask: True where a query may attend to a key.
            causal: tokens attend to no later ones.
            given: keys and values (H, M, d) of prompts that all tokens attend to, and that the block does not compute.
            rows: see above.
        """
        normed = self.norm(x)
        query = self.query(normed[:, :rows])
        key, value = self.key_value(normed)
        if given is not None:
            key, value = (
                torch.cat([own, other.expand(x.shape[0], -1, -1, -1)], 2)
                for own, other in zip((key, value), given, strict=True)
            )
        attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.finish(x[:, :rows], attended)


def call(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return function(*args)


def checkpointed(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """`function(*args)`, computed again in the backward pass instead of keeping its activations."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., L, D) -> (..., heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(..., heads, L, d) -> (..., L, heads d)."""
    return x.transpose(-3, -2).flatten(-2)
