"""A plain, slow implementation of DCP's complete forward pass, against which all fast paths are tested.

Every class runs all tokens of the text context through every block, as in the authors' release; nothing is
shared, packed, cached or skipped. It uses the weights of a `DCP` and computes its `stats="batch"`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.backbone.tokens import end_positions
from dcp_zoo.heads.dcp import DCP, PromptAttention


def forward(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """images (B, 3, H, W), one batch -> logits (B, C)."""
    text = model.encoder.text
    config = model.config
    m = config.n_ctx
    prompts = model.prompts

    x, rope = embed_images(model.encoder.visual, images, prompts["vision"])
    y, start, end, mask = embed_names(model)
    inside = slice(start, start + m)
    first = (prompts["text"] + text.positional_embedding[inside]).expand(len(y), -1, -1)
    y = torch.cat([y[:, :start], first, y[:, start + m :]], 1)

    vision_blocks = vision_blocks_of(model)
    text_blocks = list(text.transformer.resblocks)
    for i in range(max(len(vision_blocks), len(text_blocks))):
        is_coupled = 1 <= i <= min(config.depth, len(vision_blocks) - 1, len(text_blocks) - 1)
        if is_coupled and config.coupling != "none":
            cmpa: Any = model.cmpa[0 if config.share_cmpa else i - 1]
            v = pool_prompts(x[:, -m:], config.pooling)  # (M, Dv)
            t = pool_prompts(y[:, inside], config.pooling)  # (M, Dt)
            if config.coupling in ("bidirectional", "text_to_vision", "self"):
                new_v = rewrite(cmpa.to_vision, v, v if config.coupling == "self" else t)
                x = torch.cat([x[:, :-m], new_v.expand(len(x), -1, -1)], 1)
            if config.coupling in ("bidirectional", "vision_to_text", "self"):
                new_t = rewrite(cmpa.to_text, t, t if config.coupling == "self" else v)
                y = torch.cat([y[:, :start], new_t.expand(len(y), -1, -1), y[:, start + m :]], 1)
        if i < len(vision_blocks):
            x = vision_blocks[i](x) if rope is None else vision_blocks[i](x, rope=rope)
        if i < len(text_blocks):
            y = text_blocks[i](y, attn_mask=mask)

    image = F.normalize(pool_images(model.encoder.visual, x[:, :-m]), dim=-1)
    y = text.ln_final(y)[torch.arange(len(y)), end]
    projection = text.text_projection
    if projection is not None:
        y = projection(y) if isinstance(projection, nn.Linear) else y @ projection
    logits = model.encoder.clip.logit_scale.exp() * image @ F.normalize(y, dim=-1).T
    return logits if model.encoder.clip.logit_bias is None else logits + model.encoder.clip.logit_bias


def vision_blocks_of(model: DCP) -> list[Any]:
    return [block.module for block in model.encoder.vision_tower.blocks]


def embed_images(visual: Any, images: torch.Tensor, prompts: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Tokens (B, N + M, Dv) that enter block 0, prompts at the end, and rotary positions (patches + M, ..),
    if any."""
    prompts = prompts.expand(len(images), -1, -1)
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        x = trunk._pos_embed(trunk.patch_embed(images))
        rope = None
        if isinstance(x, tuple):
            x, rope = x
        if rope is not None:  # prompts are not turned: sine 0, cosine 1
            sin, cos = (part[:1].expand(prompts.shape[1], -1) for part in rope.chunk(2, -1))
            rope = torch.cat([rope, torch.cat([torch.zeros_like(sin), torch.ones_like(cos)], -1)])
        return trunk.norm_pre(torch.cat([x, prompts], 1)), rope
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.expand(len(images), 1, -1)
    x = torch.cat([class_token, patches], 1) + visual.positional_embedding
    return visual.ln_pre(torch.cat([x, prompts], 1)), None


def pool_images(visual: Any, x: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, Dv) after the last block, without the prompts -> features (B, E)."""
    if hasattr(visual, "trunk"):
        return visual.head(visual.trunk.forward_head(visual.trunk.norm(x)))
    return visual._pool(x)[0] @ visual.proj


def embed_names(model: DCP) -> tuple[torch.Tensor, int, torch.Tensor, Any]:
    """Embedded class names (C, L, Dt), with any tokens in place of the prompts, the position of the first
    prompt, the position (C,) that is pooled, and the attention mask."""
    text = model.encoder.text
    if model.encoder.text_tower.shares_prefix:
        ids, end = tokenize(model)
        return text.token_embedding(ids) + text.positional_embedding, 1, end, text.attn_mask
    ids = torch.cat([chunk.ids for chunk in model.name_tokens])
    end = torch.cat([chunk.ends for chunk in model.name_tokens])
    start = model.name_tokens.prompts.start
    if hasattr(text, "_embeds"):  # with CoCa's class token and mask
        y, mask = text._embeds(ids)
    else:
        y = text.token_embedding(ids) + text.positional_embedding
        mask = text.attn_mask
    return y, start, end, mask


def tokenize(model: DCP) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (C, context) of `[SOS] X .. X name . [EOT]`, with M times X in place of the prompts, and
    ends (C,). The rest of a phrase precedes the name."""
    prompts = "X " * model.config.n_ctx
    sentences = [prompts + model.template.format(name.replace("_", " ")) for name in model.classnames]
    ids = model.encoder.tokenizer(sentences, context_length=len(model.encoder.text.positional_embedding))
    return ids, end_positions(model.encoder.text, ids)


def pool_prompts(prompts: torch.Tensor, pooling: str) -> torch.Tensor:
    """(n, M, D) -> (M, D)"""
    if pooling == "mean":
        return prompts.mean(0)
    return prompts.amax(0) if pooling == "max" else prompts[0]


def rewrite(block: PromptAttention, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """One direction of CMPA: own (M, D), other (M, D_other) -> (M, D)."""
    w_q, w_k, w_v = block.attn.in_proj_weight.chunk(3)
    b_q, b_k, b_v = block.attn.in_proj_bias.chunk(3)
    query = block.norm1(block.query(other))
    key = block.norm1(own)
    heads = []
    for rows in torch.arange(len(w_q)).split(64):
        q = query @ w_q[rows].T + b_q[rows]
        k = key @ w_k[rows].T + b_k[rows]
        v = key @ w_v[rows].T + b_v[rows]
        heads.append((q @ k.T / 8).softmax(-1) @ v)  # 8 = sqrt(64)
    mlp: Any = block.mlp
    own = own + block.attn.out_proj(torch.cat(heads, -1))
    hidden = mlp.c_fc(block.norm2(own))
    return own + mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
