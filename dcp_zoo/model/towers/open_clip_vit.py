"""open_clip's own vision transformer, and its blocks, which its text transformer shares."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.model._linear import call_linear, linear
from dcp_zoo.model.towers.blocks import Block, KeyValue, merge_heads, split_heads
from dcp_zoo.model.towers.vision import VisionTower


def _is_plain(module: Any, *names: str) -> bool:
    """Whether the module lacks these parts, or has them without effect."""
    return all(isinstance(getattr(module, name, None), (nn.Identity, type(None))) for name in names)


# open_clip's block has torch's attention or open_clip's own, with the same parameter names
BLOCK_NEEDS: dict[str, Callable[[Any], bool]] = {
    "attention with in_proj_weight, in_proj_bias, out_proj and num_heads": lambda block: all(
        getattr(block.attn, name, None) is not None
        for name in ("in_proj_weight", "in_proj_bias", "out_proj", "num_heads")
    ),
    "no query-key normalisation (qk_norm)": lambda block: _is_plain(block.attn, "ln_q", "ln_k", "q_norm", "k_norm"),
    "no scaled cosine attention (scaled_cosine)": lambda block: _is_plain(block.attn, "logit_scale"),
    "no scaled heads (scale_heads)": lambda block: _is_plain(block.attn, "head_scale"),
    "no normalisation inside attention (inner_norm) or MLP, nor between them": lambda block: (
        _is_plain(block.attn, "ln_inner") and _is_plain(block, "ln_attn") and _is_plain(block.mlp, "ln", "norm")
    ),
}


def missing_parts(blocks: Iterable[nn.Module]) -> list[str]:
    """What these blocks lack to be an `OpenClipBlock`."""
    blocks = list(blocks)
    return [need for need, met in BLOCK_NEEDS.items() if not all(met(block) for block in blocks)]


class OpenClipBlock(Block):
    """open_clip's residual block."""

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.module.ln_1(x)

    def query(self, normed: torch.Tensor, rotate: bool = True) -> torch.Tensor:
        attn, d = self.module.attn, normed.shape[-1]
        return split_heads(linear(normed, attn.in_proj_weight[:d], attn.in_proj_bias[:d]), attn.num_heads)

    def key_value(self, normed: torch.Tensor, rotate: bool = True) -> KeyValue:
        attn, d = self.module.attn, normed.shape[-1]
        key, value = linear(normed, attn.in_proj_weight[d:], attn.in_proj_bias[d:]).chunk(2, -1)
        return split_heads(key, attn.num_heads), split_heads(value, attn.num_heads)

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        block = self.module
        x = x + block.ls_1(call_linear(block.attn.out_proj, merge_heads(attended)))
        return x + block.ls_2(self.mlp(block.ln_2(x)))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D).

        QuickGELU, h * sigmoid(1.702 h), is computed as silu(1.702 h) / 1.702: the same function, and the backward pass
        needs one tensor of the hidden width instead of two.
        """
        mlp = self.module.mlp
        hidden = call_linear(mlp.c_fc, x)
        quick = type(mlp.gelu).__name__ == "QuickGELU"
        return call_linear(mlp.c_proj, F.silu(1.702 * hidden) / 1.702 if quick else mlp.gelu(hidden))


class OpenClipViT(VisionTower):
    """`open_clip.transformer.VisionTransformer`: pooled at its class token, by their mean (CLIPA) or by attention
    (CoCa)."""

    block_path = "transformer.resblocks"
    num_prefix = 1

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.blocks = [OpenClipBlock(block) for block in visual.transformer.resblocks]
        self.width = visual.class_embedding.shape[-1]
        self.grid, self.patch_size = tuple(visual.grid_size), tuple(visual.patch_size)
        self.token_only = visual.pool_type == "tok" and getattr(visual, "attn_pool", None) is None
        self.pooled = 1 if self.token_only else self.num_tokens

    @staticmethod
    def missing(visual: Any) -> list[str]:
        """What an image tower lacks to be of this kind."""
        known = visual.pool_type in ("tok", "avg")
        return missing_parts(visual.transformer.resblocks) + ["pooling of kind tok or avg"] * (not known)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.class_embedding.dtype

    @property
    def has_stem(self) -> bool:
        return not isinstance(self.visual.conv1, nn.Conv2d)

    def patch_maps(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual.conv1(images.to(self.dtype))

    def embed(self, images: torch.Tensor, patches: bool = False) -> torch.Tensor:
        visual = self.visual
        maps = images.to(self.dtype) if patches else self.patch_maps(images)
        tokens = maps.flatten(2).transpose(1, 2)  # (B, patches, Dv)
        class_token = visual.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        x = torch.cat([class_token, tokens], 1) + visual.positional_embedding.to(tokens.dtype)
        return visual.ln_pre(visual.patch_dropout(x))

    def embed_prompts(self, prompts: torch.Tensor) -> torch.Tensor:
        return self.visual.ln_pre(prompts.to(self.dtype))

    @property
    def norm(self) -> nn.Module:
        return self.visual.ln_post

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        features = self.visual.ln_post(x[:, 0]) if self.token_only else self.visual._pool(x)[0]
        return features if self.visual.proj is None else features @ self.visual.proj
