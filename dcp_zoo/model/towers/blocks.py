"""One transformer block, computed in steps, so that attention can read tokens that the block does not rewrite.

The block itself could not do this: attend to prompts without computing them, share one prefix between classes, and in
the last block compute only the pooled tokens. A family of blocks says where its parameters are.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dcp_zoo.model._torch import call_linear, linear

KeyValue = tuple[Tensor, Tensor]  # each (..., H, L, d)


class Block:
    """One block: x + out(attention(norm(x))), then the MLP. It holds the module, and no parameters of its own.
    Without `rotate`, queries and keys are those of tokens that have no position."""

    norm: Callable[[Tensor], Tensor]  # x (..., L, D) -> what attention reads (..., L, D)
    # (normed (..., L, D), "q" or "kv") -> queries (..., L, D), or keys and values (..., L, 2 D)
    project: Callable[[Tensor, str], Tensor]
    finish: Callable[[Tensor, Tensor], Tensor]  # x (..., L, D), attended (..., H, L, d) -> after the block (..., L, D)

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def rotate(self, x: Tensor) -> Tensor:
        """Queries or keys (..., H, L, d), turned by their positions if the tower has rotary ones."""
        return x

    def query(self, normed: Tensor, rotate: bool = True) -> Tensor:
        """normed (..., L, D) -> queries (..., H, L, d)."""
        query = split_heads(self.project(normed, "q"), self.module.attn.num_heads)
        return self.rotate(query) if rotate else query

    def key_value(self, normed: Tensor, rotate: bool = True) -> KeyValue:
        """normed (..., L, D) -> keys and values, each (..., H, L, d)."""
        key, value = (split_heads(x, self.module.attn.num_heads) for x in self.project(normed, "kv").chunk(2, -1))
        return self.rotate(key) if rotate else key, value

    def prompts(self, prompts: Tensor) -> KeyValue:
        """Prompts (M, D), which have no position, as they enter the block -> their keys and values (H, M, d)."""
        return self.key_value(self.norm(prompts), rotate=False)

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        given: KeyValue | None = None,
        rows: int | None = None,
    ) -> Tensor:
        """x (B, L, D) -> its first `rows` tokens after the block, by default all. `mask` is True where a query may
        attend; `given` are keys and values (H, M, d) of prompts that are attended to, but not computed."""
        normed = self.norm(x)
        query = self.query(normed[:, :rows])
        key, value = self.key_value(normed)
        if given is not None:
            key, value = (
                torch.cat([own, other.expand(x.shape[0], -1, -1, -1)], 2)
                for own, other in zip((key, value), given, strict=True)
            )
        return self.finish(x[:, :rows], attend(query, key, value, mask, causal))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention of queries (..., H, Q, d) to keys and values (..., H, L, d) -> (..., H, Q, d). In bfloat16 on a CPU by
    plain products, which with their gradients take 0.6 of the time of torch's own kernel."""
    if mask is None and not causal and query.is_cpu and query.dtype == torch.bfloat16:
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)


def call(function: Callable[..., Tensor], *args: object) -> Tensor:
    return function(*args)


def checkpointed(function: Callable[..., Tensor], *args: object) -> Tensor:
    """`function(*args)`, computed again in the backward pass instead of keeping its activations."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, D) -> (..., heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(..., heads, L, d) -> (..., L, heads d)."""
    return x.transpose(-3, -2).flatten(-2)


def is_plain(module: object, *names: str) -> bool:
    """Whether the module lacks these parts, or has them without effect."""
    return all(isinstance(getattr(module, name, None), (nn.Identity, type(None))) for name in names)


# open_clip's block has torch's attention or open_clip's own, with the same parameter names
BLOCK_NEEDS: dict[str, Callable[[Any], bool]] = {
    "attention with in_proj_weight, in_proj_bias, out_proj and num_heads": lambda block: all(
        getattr(block.attn, name, None) is not None
        for name in ("in_proj_weight", "in_proj_bias", "out_proj", "num_heads")
    ),
    "no query-key normalisation (qk_norm)": lambda block: is_plain(block.attn, "ln_q", "ln_k", "q_norm", "k_norm"),
    "no scaled cosine attention (scaled_cosine)": lambda block: is_plain(block.attn, "logit_scale"),
    "no scaled heads (scale_heads)": lambda block: is_plain(block.attn, "head_scale"),
    "no normalisation inside attention (inner_norm) or MLP, nor between them": lambda block: (
        is_plain(block.attn, "ln_inner") and is_plain(block, "ln_attn") and is_plain(block.mlp, "ln", "norm")
    ),
}


def missing_parts(blocks: Iterable[nn.Module], needs: Mapping[str, Callable[[Any], bool]] = BLOCK_NEEDS) -> list[str]:
    """What these blocks lack, by default to be an `OpenClipBlock`."""
    blocks = list(blocks)
    return [need for need, met in needs.items() if not all(met(block) for block in blocks)]


class OpenClipBlock(Block):
    """open_clip's residual block."""

    def norm(self, x: Tensor) -> Tensor:
        return self.module.ln_1(x)

    def project(self, normed: Tensor, parts: str) -> Tensor:
        attn, d = self.module.attn, normed.shape[-1]
        rows = slice(d) if parts == "q" else slice(d, None)
        return linear(normed, attn.in_proj_weight[rows], attn.in_proj_bias[rows])

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        block = self.module
        x = x + block.ls_1(call_linear(block.attn.out_proj, merge_heads(attended)))
        return x + block.ls_2(self.mlp(block.ln_2(x)))

    def mlp(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D). QuickGELU, h * sigmoid(1.702 h), is computed as silu(1.702 h) / 1.702: the same
        function, and the backward pass needs one tensor of the hidden width instead of two."""
        mlp = self.module.mlp
        hidden = call_linear(mlp.c_fc, x)
        quick = type(mlp.gelu).__name__ == "QuickGELU"
        return call_linear(mlp.c_proj, F.silu(1.702 * hidden) / 1.702 if quick else mlp.gelu(hidden))
