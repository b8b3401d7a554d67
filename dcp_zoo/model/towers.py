"""CLIP's two towers, opened up so that prompts can ride in them and be rewritten between blocks.

These are functions over the modules of an open_clip CLIP, which stay where they are. Attention is computed from the
block's parameters by name wherever open_clip's own block cannot do it: in the text tower, whose classes share one
prefix, and in each tower's last block, where a single token needs a query.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model._linear import call_linear, linear
from dcp_zoo.model.names import ClassNames

# --------------------------------------------------------------------------------------------------- what is supported


def text_modules(clip: nn.Module) -> Any:
    """The module that holds the text tower: the CLIP itself, or `.text` of open_clip's CustomTextCLIP."""
    return getattr(clip, "text", clip)


def check_supported(clip: nn.Module) -> None:
    """Raise ZooError, naming what is missing, unless `clip` has a class-token ViT and a causal text transformer."""
    visual: Any = getattr(clip, "visual", None)
    text = text_modules(clip)
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    needs = {
        "a vision transformer with a class token": hasattr(visual, "class_embedding"),
        "class-token pooling": getattr(visual, "pool_type", None) == "tok",
        "no attentional pooling": getattr(visual, "attn_pool", None) is None,
        "a causal text transformer": hasattr(text, "transformer") and causal,
        "text pooled at the end token": pool in ("argmax", "eos"),
    }
    if needs["a vision transformer with a class token"] and needs["a causal text transformer"]:
        blocks = [*visual.transformer.resblocks, *text.transformer.resblocks]
        needs["plain multi-head attention"] = all(isinstance(b.attn, nn.MultiheadAttention) for b in blocks)
    missing = [need for need, met in needs.items() if not met]
    if missing:
        raise ZooError(
            f"DCP cannot use this CLIP ({type(clip).__name__}): it needs {', '.join(missing)}. "
            "Any open_clip model with a plain ViT works, such as ViT-B-32, ViT-B-16 or ViT-L-14."
        )


# -------------------------------------------------------------------------------------------------- pieces of one block


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(N, L, D) -> (N, heads, L, D / heads)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def query_heads(attn: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Queries of x (N, L, D) -> (N, H, L, D/H)."""
    d = attn.embed_dim
    return split_heads(linear(x, attn.in_proj_weight[:d], attn.in_proj_bias[:d]), attn.num_heads)


def key_value_heads(attn: nn.MultiheadAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of x (N, L, D) -> two (N, H, L, D/H)."""
    d = attn.embed_dim
    key, value = linear(x, attn.in_proj_weight[d:], attn.in_proj_bias[d:]).chunk(2, -1)
    return split_heads(key, attn.num_heads), split_heads(value, attn.num_heads)


def finish_block(block: Any, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The rest of a residual block after attention: x (N, L, D), attended (N, H, L, D/H) -> (N, L, D)."""
    out = block.attn.out_proj
    x = x + block.ls_1(linear(attended.transpose(1, 2).flatten(2), out.weight, out.bias))
    return x + block.ls_2(feed_forward(block.mlp, block.ln_2(x)))


def feed_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """The MLP of a block: (..., D) -> (..., D).

    QuickGELU, h * sigmoid(1.702 h), is computed as silu(1.702 h) / 1.702: the same function, and the backward pass
    needs one tensor of the hidden width instead of two.
    """
    hidden = call_linear(mlp.c_fc, x)
    quick = type(mlp.gelu).__name__ == "QuickGELU"
    return call_linear(mlp.c_proj, F.silu(1.702 * hidden) / 1.702 if quick else mlp.gelu(hidden))


# --------------------------------------------------------------------------------------------------------- vision tower


def call(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return function(*args)


def embed_images(visual: Any, images: torch.Tensor) -> torch.Tensor:
    """images (B, 3, H, W) -> x (B, 1 + patches, Dv): class token and patches, with their positions."""
    images = images.to(visual.class_embedding.dtype)
    patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, Dv)
    class_token = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
    x = torch.cat([class_token, patches], 1) + visual.positional_embedding.to(patches.dtype)
    return visual.ln_pre(visual.patch_dropout(x))


def vision_block(block: Any, x: torch.Tensor, prompts: torch.Tensor | None = None, last: bool = False) -> torch.Tensor:
    """One block: x (B, L, Dv) -> (B, L, Dv), or in the last block the class token alone -> (B, 1, Dv).

    `prompts` (1, M, Dv) stand beside x to be attended to. What the block would make of them is not computed: it is not
    needed where the next block is given prompts of its own.
    """
    normed = block.ln_1(x)
    key, value = key_value_heads(block.attn, normed)
    if prompts is not None:
        prompt_key, prompt_value = key_value_heads(block.attn, block.ln_1(prompts.to(x.dtype)))
        key = torch.cat([key, prompt_key.expand(x.shape[0], -1, -1, -1)], 2)
        value = torch.cat([value, prompt_value.expand(x.shape[0], -1, -1, -1)], 2)
    rows = 1 if last else x.shape[1]
    attended = F.scaled_dot_product_attention(query_heads(block.attn, normed[:, :rows]), key, value)
    return finish_block(block, x[:, :rows], attended)


def prompted_vision(
    visual: Any,
    images: torch.Tensor,
    prompts: Sequence[torch.Tensor],
    stop: int | None = None,
    run: Callable[..., torch.Tensor] = call,
) -> torch.Tensor:
    """Tokens x as blocks 0 .. stop - 1 leave them, given the prompts (1, M, Dv) that enter the first of them.

    What a block makes of its prompts is thrown away when the next is given its own, so only the last prompts given
    join the sequence; the others are just attended to. `run` calls a block, in case it shall do more than that.
    """
    blocks = visual.transformer.resblocks
    x = embed_images(visual, images)
    for i in range(len(blocks) if stop is None else stop):
        if i == len(prompts) - 1:
            x = torch.cat([x, prompts[i].to(x.dtype).expand(x.shape[0], -1, -1)], 1)
        beside = prompts[i] if i < len(prompts) - 1 else None
        x = run(vision_block, blocks[i], x, beside, i == len(blocks) - 1)
    return x


def image_features(visual: Any, x: torch.Tensor) -> torch.Tensor:
    """Class token x (B, 1, Dv) -> normalised features (B, E)."""
    features = visual.ln_post(x[:, 0])
    return F.normalize(features if visual.proj is None else features @ visual.proj, dim=-1)


# ----------------------------------------------------------------------------------------------------------- text tower


KeyValue = tuple[torch.Tensor, torch.Tensor]  # each (N, H, P, d)


def embed_prefix(text: Any, prompts: torch.Tensor, sos_id: int) -> torch.Tensor:
    """prompts (M, Dt) -> y (1, P, Dt), P = 1 + M: the start token and the prompts, which all classes share."""
    y = torch.cat([text.token_embedding.weight[sos_id : sos_id + 1], prompts.to(text.token_embedding.weight.dtype)])
    return (y + text.positional_embedding[: len(y)])[None]


def prefix_block(block: Any, y: torch.Tensor, last: bool = False) -> tuple[torch.Tensor, KeyValue]:
    """One causal block over the shared prefix y (N, P, Dt) -> y after it, and the keys and values that names attend to.

    Causality makes the prefix the same for every class, whatever follows. Nothing follows the last block's.
    """
    normed = block.ln_1(y)
    key, value = key_value_heads(block.attn, normed)
    if not last:
        attended = F.scaled_dot_product_attention(query_heads(block.attn, normed), key, value, is_causal=True)
        y = finish_block(block, y, attended)
    return y, (key, value)


def prompted_text(text: Any, names: Sequence[ClassNames], prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Class names behind a prefix, given the prompts (M, Dt) that enter the first blocks -> features (C, E).

    `names` are chunks of `tokenize_names`. Prompts behind the last ones given are what the blocks make of those.
    """
    y, keys_values = embed_prefix(text, prompts[0], names[0].sos_id), []
    for i, block in enumerate(text.transformer.resblocks):
        if 1 <= i < len(prompts):
            y = torch.cat([y[:, :1], prompts[i].to(y.dtype)[None]], 1)
        y, key_value = prefix_block(block, y, i == len(text.transformer.resblocks) - 1)
        keys_values.append(key_value)
    return torch.cat([name_features(text, chunk, keys_values)[0] for chunk in names])


def name_features(text: Any, names: ClassNames, prefix: Sequence[KeyValue]) -> torch.Tensor:
    """All blocks over the class names, given the prefix's keys and values in each -> normalised features (N, C, E).

    The last block computes the end tokens alone.
    """
    y = (text.token_embedding(names.ids) + text.positional_embedding[names.positions])[None]  # (1, U, Dt)
    for block, prefix_key_value in zip(text.transformer.resblocks, prefix, strict=True):
        y = y.expand(len(prefix_key_value[0]), -1, -1)
        normed = block.ln_1(y)
        key, value = map(names.spread, key_value_heads(block.attn, normed))  # (N, H, S, d)
        if block is text.transformer.resblocks[-1]:
            query = query_heads(block.attn, normed[:, names.ends])
            y = finish_block(block, y[:, names.ends], attend_names(query, (key, value), prefix_key_value, names))
        else:
            query = names.spread(query_heads(block.attn, normed))
            attended = names.collect(attend_names(query, (key, value), prefix_key_value, names))
            y = finish_block(block, y, attended)
    return text_features(text, y, names)


def attend_names(query: torch.Tensor, own: KeyValue, prefix: KeyValue, names: ClassNames) -> torch.Tensor:
    """Attention of name tokens to the shared prefix and to the tokens of the same name up to themselves.

    query (N, H, S, d) for all name tokens, or (N, H, C, d) for the end tokens alone -> the same shape.
    The prefix is never copied per class: its scores are one matrix product for all names.
    """
    (key, value), (prefix_key, prefix_value) = own, prefix
    n_prefix, per_token = prefix_key.shape[2], query.shape[2] == key.shape[2]
    query = query * query.shape[-1] ** -0.5
    prefix_scores = query @ prefix_key.transpose(-1, -2)  # (N, H, S or C, P)
    out, q0, s0 = [], 0, 0
    for length, count in names.groups:
        q_len = length if per_token else 1
        q = query[:, :, q0 : q0 + count * q_len].unflatten(2, (count, q_len))  # (N, H, names, q_len, d)
        k = key[:, :, s0 : s0 + count * length].unflatten(2, (count, length))
        v = value[:, :, s0 : s0 + count * length].unflatten(2, (count, length))
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)[length - q_len :]
        own_scores = (q @ k.transpose(-1, -2)).masked_fill(future, float("-inf"))  # (N, H, names, q_len, length)
        to_prefix = prefix_scores[:, :, q0 : q0 + count * q_len].unflatten(2, (count, q_len))
        weights = torch.cat([to_prefix, own_scores], -1).softmax(-1).to(v.dtype)
        prefix_part = weights[..., :n_prefix].flatten(2, 3) @ prefix_value  # (N, H, names * q_len, d)
        out.append(prefix_part + (weights[..., n_prefix:] @ v).flatten(2, 3))
        q0, s0 = q0 + count * q_len, s0 + count * length
    return torch.cat(out, 2)


def text_features(text: Any, y: torch.Tensor, names: ClassNames) -> torch.Tensor:
    """End tokens y (N, C, Dt) in packed order -> normalised features (N, C, E) in class order."""
    features = text.ln_final(y)[:, names.order]
    projection = text.text_projection
    if isinstance(projection, nn.Linear):
        features = projection(features)
    elif projection is not None:
        features = features @ projection
    return F.normalize(features, dim=-1)


# --------------------------------------------------------------------------------------------------------- both towers


def cosine_logits(clip: Any, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """image_features (B, E), text_features (N, C, E), N being 1 or B -> exp(logit_scale) * cosine (B, C)."""
    if len(text_features) == 1:
        cosine = image_features @ text_features[0].T
    else:
        cosine = torch.einsum("be,bce->bc", image_features, text_features)
    logits = clip.logit_scale.exp() * cosine.to(clip.logit_scale.dtype)
    return logits if clip.logit_bias is None else logits + clip.logit_bias
