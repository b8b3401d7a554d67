"""Attention of the class token and the vision prompts, block by block."""

from typing import Any

import torch

from dcp_zoo.model import towers
from dcp_zoo.model.dcp import DCP


@torch.inference_mode()
def attention_weights(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """Attention weights of the class token and of each prompt over all tokens, averaged over heads.

    Prompts are rewritten before each coupled block in the model's context; with "batch", the batch is `images`.

    Args:
        model: in eval mode.
        images: (B, 3, H, W), normalised as `create_transform` does.

    Returns:
        (B, blocks, 1 + M, 1 + patches + M). Rows are queries: class token, prompts. Columns are keys: class token,
        patches, prompts. Every row sums to 1.
    """
    if model.context == "sample" and len(images) > 1:
        return torch.cat([attention_weights(model, image) for image in images.split(1)])
    weights = []
    for step, x, _ in model.walk(images):
        if step.block < len(model.vision_blocks):
            queries = torch.cat([x[:, :1], x[:, -model.config.n_ctx :]], 1)
            weights.append(_softmax_weights(model.vision_blocks[step.block], queries, x))
    return torch.stack(weights, 1)


def attention_maps(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """The patch columns of `attention_weights`, in the shape of the image: (B, blocks, 1 + M, h, w).

    The rest of each row's sum of 1 is attention to the class token and the prompts.
    """
    patches = attention_weights(model, images)[..., 1 : -model.config.n_ctx]
    return patches.unflatten(-1, tuple(model.visual.grid_size))


def _softmax_weights(block: Any, queries: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (B, Q, L) with which the tokens `queries` (B, Q, Dv) attend to x (B, L, Dv) in a block."""
    query = towers.query_heads(block.attn, block.ln_1(queries))  # (B, H, Q, d)
    key, _ = towers.key_value_heads(block.attn, block.ln_1(x))  # (B, H, L, d)
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)
