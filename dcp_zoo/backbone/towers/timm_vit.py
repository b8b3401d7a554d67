"""timm's transformers in open_clip: `VisionTransformer` (SigLIP, MobileCLIP-B, ViTamin), `Eva` (EVA-02,
PE-Core)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.inputs import Tokens
from dcp_zoo.backbone.towers.open_clip import (
    HIDDEN,
    Block,
    VisionTower,
    merge_heads,
)

BLOCKS = ("Block", "EvaBlock", "EvaBlockPostNorm")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")


class TimmBlock(Block):
    """timm's pre- and post-norm blocks. Rotary positions turn queries and keys of the patches alone."""

    def __init__(self, block: nn.Module, trunk: nn.Module, index: int) -> None:
        super().__init__(block)
        self.trunk: Any = trunk
        self.index = index
        self.post_norm = type(block).__name__ == "EvaBlockPostNorm"

    def norm(self, x: Tensor) -> Tensor:
        return x if self.post_norm else self.module.norm1(x)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        block = self.module
        y = merge_heads(attended)
        if hasattr(block.attn, "norm"):
            y = block.attn.norm(y)
        y = block.attn.proj(y)
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
        width = len(attn.qkv.weight) // 3
        rows = slice(width) if parts == "q" else slice(width, None)
        bias = attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:  # EVA keeps biases as three tensors
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return F.linear(normed, attn.qkv.weight[rows], None if bias is None else bias[rows])

    def rotate(self, x: Tensor) -> Tensor:
        """(..., H, L, d) of prefix tokens, patches and prompts; only the patches are turned."""
        from timm.layers import apply_rot_embed_cat

        rope = getattr(self.trunk, "rope", None)
        if rope is None:
            return x
        attn = self.module.attn
        start = attn.num_prefix_tokens
        if x.shape[-2] <= start:
            return x
        embedding = rope.get_embed()
        if self.trunk.rope_mixed:
            embedding = embedding[self.index]
        end = start + embedding.shape[-2]
        half = getattr(attn, "rotate_half", False)
        turned = apply_rot_embed_cat(x[..., start:end, :], embedding, half=half).type_as(x)
        return torch.cat([x[..., :start, :], turned, x[..., end:, :]], -2)


def is_plain(attn: Any) -> bool:
    """Whether it is an attention that `TimmBlock` computes."""
    heads = attn.num_heads
    is_normed = any(name.startswith(("q_norm", "k_norm")) for name, _ in attn.named_parameters())
    is_grouped = getattr(attn, "num_kv_heads", heads) != heads
    return type(attn).__name__ in ATTENTIONS and not (is_normed or is_grouped or getattr(attn, "gate", None))


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
        trunk = visual.trunk
        embedding = trunk.patch_embed
        self.visual = visual
        self.norm = trunk.norm
        self.has_stem = hasattr(embedding, "backbone") or not isinstance(getattr(embedding, "proj", None), nn.Conv2d)
        self.blocks = [TimmBlock(block, trunk, i) for i, block in enumerate(trunk.blocks)]
        self.width = trunk.embed_dim
        self.num_prefix = trunk.num_prefix_tokens
        self.grid = tuple(embedding.grid_size)
        height, width = visual.image_size
        self.patch_size = (height // self.grid[0], width // self.grid[1])
        self.pooled = 1 if trunk.global_pool == "token" and trunk.attn_pool is None else self.num_tokens
        hidden = {HIDDEN: trunk.num_features} if len(visual.head) else {}
        self.extra = hidden | self.of_blocks()

    @staticmethod
    def missing(visual: Any) -> str:
        """What an image tower lacks to be of this kind, or ""."""
        trunk = visual.trunk
        for block in trunk.blocks:
            kind = type(block).__name__
            if kind not in BLOCKS:
                return f"timm's Block or EvaBlock, not {kind}"
            if not is_plain(block.attn):
                return "timm's plain or rotary attention, without norms (qk_norm), gates and grouped queries"
        if trunk.dynamic_img_size or tuple(visual.image_size) != tuple(trunk.patch_embed.img_size):
            return "images of one size, the same for open_clip and timm"
        return ""

    def embed(self, images: Tensor) -> Tokens:
        trunk = self.visual.trunk
        x = trunk._pos_embed(trunk.patch_embed(self.checked(images)))
        if isinstance(x, tuple):  # Eva also returns its rotary positions, which `TimmBlock` looks up itself
            x = x[0]
        return Tokens(trunk.norm_pre(x))

    def embed_prompts(self, prompts: Tensor) -> Tensor:
        return self.visual.trunk.norm_pre(prompts.to(self.dtype))

    def hidden(self, x: Tensor) -> Tensor:
        trunk = self.visual.trunk
        return trunk.forward_head(trunk.norm(x))

    def project(self, hidden: Tensor) -> Tensor:
        return self.visual.head(hidden)
