"""What the class token and the vision prompts look at: the vision tower's attention weights, block by block."""

from typing import Any

import torch

from dcp_zoo.model import towers
from dcp_zoo.model.dcp import DCP


@torch.inference_mode()
def attention_weights(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """Attention of the class token and of each prompt over all tokens, the mean of the heads.

    Prompts are rewritten before each coupled block as the model's context says: with "batch" the images given are the
    batch.

    Args:
        model: in eval mode.
        images: (B, 3, H, W), normalised as `create_transform` does.

    Returns:
        (B, blocks, 1 + M, 1 + patches + M). Rows are who looks, the class token first; columns are what is looked at:
        class token, patches, prompts. Every row sums to 1.
    """
    if model.context == "sample" and len(images) > 1:
        return torch.cat([attention_weights(model, image) for image in images.split(1)])
    weights = []
    for step, x, _ in model.walk(images):
        if step.block < len(model.vision_blocks):
            asking = torch.cat([x[:, :1], x[:, -model.config.n_ctx :]], 1)
            weights.append(_softmax_weights(model.vision_blocks[step.block], asking, x))
    return torch.stack(weights, 1)


def attention_maps(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """The patches' part of `attention_weights`, in the shape of the image: (B, blocks, 1 + M, h, w).

    What a row lacks to 1 goes to the class token and to the prompts.
    """
    patches = attention_weights(model, images)[..., 1 : -model.config.n_ctx]
    return patches.unflatten(-1, tuple(model.visual.grid_size))


def _softmax_weights(block: Any, asking: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (B, Q, L) with which the tokens asking (B, Q, Dv) attend to x (B, L, Dv) in a block."""
    query = towers.query_heads(block.attn, block.ln_1(asking))  # (B, H, Q, d)
    key, _ = towers.key_value_heads(block.attn, block.ln_1(x))  # (B, H, L, d)
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)
