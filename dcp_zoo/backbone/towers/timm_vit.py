"""timm's transformers in open_clip: `VisionTransformer` (SigLIP, MobileCLIP-B, ViTamin), `Eva` (EVA-02, PE-Core)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.inputs import Tokens
from dcp_zoo.backbone.towers.open_clip import HIDDEN, Block, VisionTower, is_plain, merge_heads, missing_parts

BLOCKS = ("Block", "EvaBlock", "EvaBlockPostNorm")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
ATTENTION_NEEDS: dict[str, Callable[[Any], bool]] = {
    "timm's plain or rotary attention": lambda block: type(block.attn).__name__ in ATTENTIONS,
    "no query-key normalisation (qk_norm)": lambda block: is_plain(block.attn, "q_norm", "k_norm"),
    "no gated or grouped-query attention": lambda block: (
        getattr(block.attn, "gate", None) is None
        and getattr(block.attn, "num_kv_heads", block.attn.num_heads) == block.attn.num_heads
    ),
}


class TimmBlock(Block):
    """timm's pre- and post-norm blocks. Rotary positions turn queries and keys of the patches alone."""

    def __init__(self, block: nn.Module, trunk: nn.Module, index: int) -> None:
        super().__init__(block)
        self.trunk: Any = trunk
        self.index, self.post_norm = index, type(block).__name__ == "EvaBlockPostNorm"

    def norm(self, x: Tensor) -> Tensor:
        return x if self.post_norm else self.module.norm1(x)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        block, attn = self.module, self.module.attn
        y = merge_heads(attended)
        y = attn.proj(attn.norm(y) if hasattr(attn, "norm") else y)
        if self.post_norm:
            x = x + block.norm1(y)
            return x + block.norm2(block.mlp(x))
        x = x + _scaled(block, 1, y)
        return x + _scaled(block, 2, block.mlp(block.norm2(x)))

    def project(self, normed: Tensor, parts: str) -> Tensor:
        """From one layer or from three."""
        attn = self.module.attn
        if attn.qkv is None:
            return torch.cat([getattr(attn, f"{part}_proj")(normed) for part in parts], -1)
        d = attn.qkv.weight.shape[0] // 3
        rows = slice(d) if parts == "q" else slice(d, None)
        bias = attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:  # EVA's, which are kept apart
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return F.linear(normed, attn.qkv.weight[rows], None if bias is None else bias[rows])

    def rotate(self, x: Tensor) -> Tensor:
        """(..., H, L, d) of prefix tokens, patches and prompts; only the patches are turned."""
        from timm.layers import apply_rot_embed_cat

        rope, attn = getattr(self.trunk, "rope", None), self.module.attn
        if rope is None or x.shape[-2] <= attn.num_prefix_tokens:
            return x
        embedding = rope.get_embed()[self.index] if self.trunk.rope_mixed else rope.get_embed()
        start = attn.num_prefix_tokens
        end = start + embedding.shape[-2]
        half = {"half": True} if getattr(attn, "rotate_half", False) else {}
        turned = apply_rot_embed_cat(x[..., start:end, :], embedding, **half).type_as(x)
        return torch.cat([x[..., :start, :], turned, x[..., end:, :]], -2)


def _scaled(block: Any, n: int, y: Tensor) -> Tensor:
    """y times the block's layer scale, if any: `ls1` of `Block`, `gamma_1` of `EvaBlock`."""
    if hasattr(block, f"ls{n}"):
        return getattr(block, f"ls{n}")(y)
    gamma = getattr(block, f"gamma_{n}")
    return y if gamma is None else gamma * y


class TimmViT(VisionTower):
    """`open_clip.timm_model.TimmModel` around a timm transformer, with any of timm's poolings."""

    block_path = "trunk.blocks"

    def __init__(self, visual: Any) -> None:
        self.visual, trunk, embedding = visual, visual.trunk, visual.trunk.patch_embed
        self.norm = trunk.norm
        self.has_stem = hasattr(embedding, "backbone") or not isinstance(getattr(embedding, "proj", None), nn.Conv2d)
        self.blocks = [TimmBlock(block, trunk, i) for i, block in enumerate(trunk.blocks)]
        self.width, self.num_prefix = trunk.embed_dim, trunk.num_prefix_tokens
        self.grid = tuple(trunk.patch_embed.grid_size)
        self.patch_size = tuple(size // n for size, n in zip(visual.image_size, self.grid, strict=True))
        self.pooled = 1 if trunk.global_pool == "token" and trunk.attn_pool is None else self.num_tokens
        hidden = {HIDDEN: trunk.num_features} if len(visual.head) else {}
        self.further = hidden | self.inside()

    @staticmethod
    def missing(visual: Any) -> list[str]:
        """What an image tower lacks to be of this kind."""
        trunk = visual.trunk
        if others := [kind for block in trunk.blocks if (kind := type(block).__name__) not in BLOCKS]:
            return [f"timm's Block or EvaBlock, not {others[0]}"]
        one_size = tuple(visual.image_size) == tuple(trunk.patch_embed.img_size) and not trunk.dynamic_img_size
        sizes = ["images of one size, the same for open_clip and timm"] * (not one_size)
        return missing_parts(trunk.blocks, ATTENTION_NEEDS) + sizes

    def embed(self, images: Tensor) -> Tokens:
        trunk = self.visual.trunk
        x = trunk._pos_embed(trunk.patch_embed(self.checked(images)))
        x = x[0] if isinstance(x, tuple) else x  # Eva adds its rotary positions, which `TimmBlock` asks for itself
        return Tokens(trunk.norm_pre(x))

    def embed_prompts(self, prompts: Tensor) -> Tensor:
        return self.visual.trunk.norm_pre(prompts.to(self.dtype))

    def hidden(self, x: Tensor) -> Tensor:
        trunk = self.visual.trunk
        return trunk.forward_head(trunk.norm(x))

    def project(self, hidden: Tensor) -> Tensor:
        return self.visual.head(hidden)
