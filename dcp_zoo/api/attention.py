"""Attention of the class token and the vision prompts, block by block."""

import torch

from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.towers.blocks import Block


@torch.inference_mode()
def attention_weights(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """Attention weights of the class token and of each prompt over all tokens, averaged over heads.

    Prompts are rewritten before each coupled block in the model's context; with "batch", the batch is `images`.

    Args:
        model: in eval mode.
        images: (B, 3, H, W), normalised as `create_transform` does.

    Returns:
        (B, blocks, 1 + M, 1 + patches + M). Rows are queries: class token, prompts. Columns are keys: class token,
        patches, prompts. Every row sums to 1. A tower with registers has these beside its class token.

    Raises:
        ZooError: an image tower without a class token, such as SigLIP's.
    """
    tower = model.vision_tower
    if tower.num_prefix == 0:
        raise ZooError("The image tower of this CLIP has no class token, whose attention could be shown.")
    if model.stats == "per-image" and len(images) > 1:
        return torch.cat([attention_weights(model, image) for image in images.split(1)])
    weights = []
    for step, x, _ in model.walk(images):
        if step.block < len(model.vision_blocks):
            queries = torch.cat([x[:, : tower.num_prefix], x[:, -model.config.n_ctx :]], 1)
            weights.append(_softmax_weights(tower.blocks[step.block], queries, x))
    return torch.stack(weights, 1)


def attention_maps(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """The patch columns of `attention_weights`, in the shape of the image: (B, blocks, 1 + M, h, w).

    The rest of each row's sum of 1 is attention to the class token and the prompts.
    """
    patches = attention_weights(model, images)[..., model.vision_tower.num_prefix : -model.config.n_ctx]
    return patches.unflatten(-1, model.vision_tower.grid)


def _softmax_weights(block: Block, queries: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (B, Q, L) with which the tokens `queries` (B, Q, Dv) attend to x (B, L, Dv) in a block."""
    query = block.query(block.norm(queries), rotate=False)  # (B, H, Q, d)
    key, _ = block.key_value(block.norm(x))  # (B, H, L, d)
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)
