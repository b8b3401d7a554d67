"""A plain, slow implementation of DCP's complete forward pass, against which all fast paths are tested.

Every class runs all tokens of the text context through every block, as in the authors' release; nothing is shared,
packed, cached or skipped. It uses the weights of a `DCP` and computes its `context="batch"`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.model.cmpa import PromptAttention
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.names import end_positions


def forward(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """images (B, 3, H, W), one batch -> logits (B, C)."""
    visual, text, config = model.visual, model.text, model.config
    m = config.n_ctx

    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.expand(len(images), 1, -1)
    x = torch.cat([class_token, patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, model.prompts["vision"].expand(len(images), -1, -1)], 1))

    ids, end = tokenize(model)  # (C, 77), (C,)
    y = text.token_embedding(ids)
    prompts = model.prompts["text"].expand(len(ids), -1, -1)
    y = torch.cat([y[:, :1], prompts, y[:, 1 + m :]], 1) + text.positional_embedding

    vision_blocks, text_blocks = visual.transformer.resblocks, text.transformer.resblocks
    for i in range(max(len(vision_blocks), len(text_blocks))):
        if 1 <= i <= min(config.depth, len(vision_blocks) - 1, len(text_blocks) - 1):
            cmpa: Any = model.cmpa[0 if config.shared else i - 1]
            v = fuse(x[:, -m:], config.fusing)  # (M, Dv)
            t = fuse(y[:, 1 : 1 + m], config.fusing)  # (M, Dt)
            x = torch.cat([x[:, :-m], attend(cmpa.to_vision, v, t).expand(len(x), -1, -1)], 1)
            if config.coupling == "bidirectional":
                new_t = attend(cmpa.to_text, t, v).expand(len(y), -1, -1)
                y = torch.cat([y[:, :1], new_t, y[:, 1 + m :]], 1)
        if i < len(vision_blocks):
            x = vision_blocks[i](x)
        if i < len(text_blocks):
            y = text_blocks[i](y, attn_mask=text.attn_mask)

    image = F.normalize(visual.ln_post(x)[:, 0] @ visual.proj, dim=-1)
    y = text.ln_final(y)[torch.arange(len(y)), end]
    projection = text.text_projection
    names = F.normalize(projection(y) if isinstance(projection, nn.Linear) else y @ projection, dim=-1)
    return model.clip.logit_scale.exp() * image @ names.T


def tokenize(model: DCP) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (C, context) of `[SOS] X .. X name . [EOT]`, with M times X in place of the prompts, and ends (C,)."""
    sentences = [" ".join(["X"] * model.config.n_ctx) + f" {name.replace('_', ' ')}." for name in model.classnames]
    ids = model.tokenizer(sentences, context_length=len(model.text.positional_embedding))
    return ids, end_positions(model.text, ids)


def fuse(prompts: torch.Tensor, fusing: str) -> torch.Tensor:
    """(n, M, D) -> (M, D)"""
    if fusing == "mean":
        return prompts.mean(0)
    return prompts.amax(0) if fusing == "max" else prompts[0]


def attend(block: PromptAttention, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """One direction of CMPA: own (M, D), other (M, D_other) -> (M, D)."""
    w_q, w_k, w_v = block.attn.in_proj_weight.chunk(3)
    b_q, b_k, b_v = block.attn.in_proj_bias.chunk(3)
    query, key = block.norm1(block.query(other)), block.norm1(own)
    heads = []
    for rows in torch.arange(len(w_q)).split(64):
        q, k, v = query @ w_q[rows].T + b_q[rows], key @ w_k[rows].T + b_k[rows], key @ w_v[rows].T + b_v[rows]
        heads.append((q @ k.T / 8).softmax(-1) @ v)  # 8 = sqrt(64)
    mlp: Any = block.mlp
    own = own + block.attn.out_proj(torch.cat(heads, -1))
    hidden = mlp.c_fc(block.norm2(own))
    return own + mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
