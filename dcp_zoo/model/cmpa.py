"""Cross-Modal Prompt Attention (CMPA): the small trained module between CLIP's towers (DCP, arXiv 2305.17903)."""

from collections import OrderedDict

import torch
from open_clip.transformer import QuickGELU
from timm.layers import LayerNormFp32  # computes in float32 and returns the input's dtype
from torch import nn

from dcp_zoo.errors import ZooError

HEAD_WIDTH = 64  # of the attention heads in both CLIP towers, and therefore in CMPA


class PromptAttention(nn.Module):
    """Rewrites the prompts of one tower, whose width is a multiple of 64, from those of the other, the queries."""

    def __init__(self, dim: int, other_dim: int) -> None:
        super().__init__()
        if dim % HEAD_WIDTH:
            raise ZooError(f"CMPA needs tower widths that are multiples of {HEAD_WIDTH}, but this CLIP has {dim}.")
        self.query = nn.Linear(other_dim, dim)
        self.norm1 = LayerNormFp32(dim, eps=1e-5)
        self.attn = nn.MultiheadAttention(dim, dim // HEAD_WIDTH, batch_first=True)
        self.norm2 = LayerNormFp32(dim, eps=1e-5)
        c_fc, c_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))

    def forward(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """own (M, D), other (M, other_dim) -> the new prompts (M, D)."""
        query, key = self.norm1(self.query(other)), self.norm1(own)  # the same norm for both
        x = own + self.attn(query, key, key, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class CMPA(nn.Module):
    """Both directions of prompt attention, or only text to vision: without `to_text`, which would never be trained."""

    def __init__(self, vision_width: int, text_width: int, bidirectional: bool) -> None:
        super().__init__()
        self.to_vision = PromptAttention(vision_width, text_width)
        self.to_text = PromptAttention(text_width, vision_width) if bidirectional else None
