"""CLIP's two towers, taken apart so that prompts can be inserted into them and rewritten between blocks.

These are functions on the modules of an open_clip CLIP, which are not modified. Attention is computed from the block's
parameters by name where open_clip's block cannot do it: in the text tower, whose classes share one prefix, and in each
tower's last block, where only one token needs a query.
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
    """The module with the text tower: the CLIP itself, or `.text` of open_clip's CustomTextCLIP."""
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
        needs |= {need: all(met(block) for block in blocks) for need, met in BLOCK_NEEDS.items()}
    missing = [need for need, met in needs.items() if not met]
    if missing:
        raise ZooError(
            f"DCP cannot use this CLIP ({type(clip).__name__}): it needs {', '.join(missing)}. "
            "Any open_clip model with a plain ViT works, such as ViT-B-32, ViT-B-16 or ViT-L-14."
        )


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


# -------------------------------------------------------------------------------------------------- pieces of one block


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., L, D) -> (..., heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def query_heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """Queries of x (..., L, D) -> (..., H, L, d)."""
    d = x.shape[-1]
    return split_heads(linear(x, attn.in_proj_weight[:d], attn.in_proj_bias[:d]), attn.num_heads)


def key_value_heads(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of x (..., L, D) -> two (..., H, L, d)."""
    d = x.shape[-1]
    key, value = linear(x, attn.in_proj_weight[d:], attn.in_proj_bias[d:]).chunk(2, -1)
    return split_heads(key, attn.num_heads), split_heads(value, attn.num_heads)


def finish_block(block: Any, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The rest of a residual block after attention: x (..., L, D), attended (..., H, L, d) -> (..., L, D)."""
    out = block.attn.out_proj
    x = x + block.ls_1(linear(attended.transpose(-3, -2).flatten(-2), out.weight, out.bias))
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


def embed_images(visual: Any, images: torch.Tensor, patches: bool = False) -> torch.Tensor:
    """images (B, 3, H, W), or with `patches` their patch maps (B, Dv, h, w) -> x (B, 1 + patches, Dv): class token and
    patches, with positional embeddings."""
    images = images.to(visual.class_embedding.dtype)
    tokens = (images if patches else visual.conv1(images)).flatten(2).transpose(1, 2)  # (B, patches, Dv)
    class_token = visual.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
    x = torch.cat([class_token, tokens], 1) + visual.positional_embedding.to(tokens.dtype)
    return visual.ln_pre(visual.patch_dropout(x))


def append_prompts(x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """x (B, L, Dv), prompts (M, Dv) -> (B, L + M, Dv)."""
    return torch.cat([x, prompts.to(x.dtype).expand(x.shape[0], -1, -1)], 1)


def vision_block(block: Any, x: torch.Tensor, prompts: torch.Tensor | None = None, last: bool = False) -> torch.Tensor:
    """One block: x (B, L, Dv) -> (B, L, Dv), or for the last block only the class token -> (B, 1, Dv).

    `prompts` (M, Dv) are additional keys and values. The block's output at the prompts is not computed: it is not
    needed if the next block has new prompts.
    """
    normed = block.ln_1(x)
    key, value = key_value_heads(block.attn, normed)
    if prompts is not None:
        prompt_key, prompt_value = key_value_heads(block.attn, block.ln_1(prompts.to(x.dtype)))  # (H, M, d)
        key = torch.cat([key, prompt_key.expand(x.shape[0], -1, -1, -1)], 2)
        value = torch.cat([value, prompt_value.expand(x.shape[0], -1, -1, -1)], 2)
    rows = 1 if last else x.shape[1]
    attended = F.scaled_dot_product_attention(query_heads(block.attn, normed[:, :rows]), key, value)
    return finish_block(block, x[:, :rows], attended)


def prompted_vision(
    visual: Any,
    x: torch.Tensor,
    prompts: Sequence[torch.Tensor],
    stop: int | None = None,
    run: Callable[..., torch.Tensor] = call,
) -> torch.Tensor:
    """Embedded images x after blocks 0 .. stop - 1, given the prompts (M, Dv) that enter the first of these blocks.

    A block's output at its prompts is discarded if the next block has new ones, so only the last of `prompts` join the
    sequence; the others are only attended to. `run` calls each block, and can wrap it in gradient checkpointing.
    """
    blocks = visual.transformer.resblocks
    for i in range(len(blocks) if stop is None else stop):
        if i == len(prompts) - 1:
            x = append_prompts(x, prompts[i])
        attended = prompts[i] if i < len(prompts) - 1 else None
        x = run(vision_block, blocks[i], x, attended, i == len(blocks) - 1)
    return x


def image_features(visual: Any, x: torch.Tensor) -> torch.Tensor:
    """Class token x (B, 1, Dv) -> normalised features (B, E)."""
    features = visual.ln_post(x[:, 0])
    return F.normalize(features if visual.proj is None else features @ visual.proj, dim=-1)


# ----------------------------------------------------------------------------------------------------------- text tower


KeyValue = tuple[torch.Tensor, torch.Tensor]  # each (H, P, d)


def embed_prefix(text: Any, prompts: torch.Tensor, sos_id: int) -> torch.Tensor:
    """prompts (M, Dt) -> y (P, Dt), P = 1 + M: the start token and the prompts, shared by all classes."""
    y = torch.cat([text.token_embedding.weight[sos_id : sos_id + 1], prompts.to(text.token_embedding.weight.dtype)])
    return y + text.positional_embedding[: len(y)]


def prefix_block(block: Any, y: torch.Tensor, last: bool = False) -> tuple[torch.Tensor, KeyValue]:
    """One causal block on the shared prefix y (P, Dt) -> y after it, and the keys and values that names attend to.

    Causality makes the prefix the same for every class, whatever follows. With `last`, y is returned unchanged, as no
    block needs it.
    """
    normed = block.ln_1(y)
    key, value = key_value_heads(block.attn, normed)
    if not last:
        query = query_heads(block.attn, normed)
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)  # ONNX needs 4-D
        y = finish_block(block, y, attended[0])
    return y, (key, value)


def prompted_text(text: Any, names: Sequence[ClassNames], prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Class names after a prefix, given the prompts (M, Dt) that enter the first blocks -> features (C, E).

    `names` are chunks of `tokenize_names`. After the last of `prompts`, the blocks' outputs continue as prompts.
    """
    y, prefix = embed_prefix(text, prompts[0], names[0].sos_id), []
    for i, block in enumerate(text.transformer.resblocks):
        if 1 <= i < len(prompts):
            y = torch.cat([y[:1], prompts[i].to(y.dtype)])
        y, key_value = prefix_block(block, y, i == len(text.transformer.resblocks) - 1)
        prefix.append(key_value)
    return torch.cat([name_features(text, chunk, prefix) for chunk in names])


def name_features(text: Any, names: ClassNames, prefix: Sequence[KeyValue]) -> torch.Tensor:
    """All blocks on the class names, given the prefix's keys and values in each block -> normalised features (C, E).

    The last block computes only the end tokens.
    """
    y = text.token_embedding(names.ids) + text.positional_embedding[names.positions]  # (U, Dt)
    for block, prefix_key_value in zip(text.transformer.resblocks, prefix, strict=True):
        normed = block.ln_1(y)
        key, value = map(names.to_packed, key_value_heads(block.attn, normed))  # (H, S, d)
        if block is text.transformer.resblocks[-1]:
            query = query_heads(block.attn, normed[names.ends])
            y = finish_block(block, y[names.ends], attend_names(query, (key, value), prefix_key_value, names))
        else:
            query = names.to_packed(query_heads(block.attn, normed))
            attended = names.to_unique(attend_names(query, (key, value), prefix_key_value, names))
            y = finish_block(block, y, attended)
    return text_features(text, y, names)


def attend_names(query: torch.Tensor, own: KeyValue, prefix: KeyValue, names: ClassNames) -> torch.Tensor:
    """Attention of name tokens to the shared prefix and, causally, to the tokens of the same name.

    query (H, S, d) for all name tokens, or (H, C, d) for only the end tokens -> the same shape.
    The prefix is not copied per class: its scores are one matrix product for all names.
    """
    (key, value), (prefix_key, prefix_value) = own, prefix
    n_prefix, per_token = prefix_key.shape[1], query.shape[1] == key.shape[1]
    query = query * query.shape[-1] ** -0.5
    prefix_scores = query @ prefix_key.transpose(-1, -2)  # (H, S or C, P)
    out, q0, s0 = [], 0, 0
    for length, count in names.groups:
        q_len = length if per_token else 1
        q = query[:, q0 : q0 + count * q_len].unflatten(1, (count, q_len))  # (H, names, q_len, d)
        k = key[:, s0 : s0 + count * length].unflatten(1, (count, length))
        v = value[:, s0 : s0 + count * length].unflatten(1, (count, length))
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)[length - q_len :]
        own_scores = (q @ k.transpose(-1, -2)).masked_fill(future, float("-inf"))  # (H, names, q_len, length)
        to_prefix = prefix_scores[:, q0 : q0 + count * q_len].unflatten(1, (count, q_len))
        weights = torch.cat([to_prefix, own_scores], -1).softmax(-1).to(v.dtype)
        prefix_part = weights[..., :n_prefix].flatten(1, 2) @ prefix_value  # (H, names * q_len, d)
        out.append(prefix_part + (weights[..., n_prefix:] @ v).flatten(1, 2))
        q0, s0 = q0 + count * q_len, s0 + count * length
    return torch.cat(out, 1)


def text_features(text: Any, y: torch.Tensor, names: ClassNames) -> torch.Tensor:
    """End tokens y (C, Dt) in packed order -> normalised features (C, E) in class order."""
    features = text.ln_final(y)[names.order]
    projection = text.text_projection
    if isinstance(projection, nn.Linear):
        features = projection(features)
    elif projection is not None:
        features = features @ projection
    return F.normalize(features, dim=-1)


# --------------------------------------------------------------------------------------------------------- both towers


def cosine_logits(clip: Any, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """image_features (B, E), text_features (C, E) -> exp(logit_scale) * cosine (B, C)."""
    logits = clip.logit_scale.exp() * (image_features @ text_features.T).to(clip.logit_scale.dtype)
    return logits if clip.logit_bias is None else logits + clip.logit_bias
