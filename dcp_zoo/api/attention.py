"""Where a head's prompts attend to."""

import torch

from dcp_zoo.errors import ZooError
from dcp_zoo.model._torch import in_eval_mode
from dcp_zoo.model.dcp import DCP


@torch.inference_mode()
def attention_weights(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """Attention weights of the class token and of each prompt over all tokens, averaged over heads. ZooError for an
    image tower without a class token, such as SigLIP's.

    Args:
        model: any DCP; it is run in eval mode, with the statistics of `model.stats`.
        images: (B, 3, H, W), normalised as `create_transform` does.

    Returns:
        (B, blocks with prompts, 1 + M, 1 + patches + M). Rows are queries: class token, prompts. Columns are keys:
        class token, patches, prompts. Every row sums to 1. A tower with registers has these beside its class token.
    """
    tower = model.encoder.vision_tower
    if tower.num_prefix == 0:
        raise ZooError("The image tower of this CLIP has no class token, whose attention could be shown.")
    with in_eval_mode(model):
        weights = []
        for step, x, _ in model._walk(images):
            if model.first_block <= step.block < len(tower.blocks):
                block = tower.blocks[step.block]
                queries = torch.cat([x[:, : tower.num_prefix], x[:, -model.config.n_ctx :]], 1)
                query = block.query(block.norm(queries), rotate=False)  # (B, H, Q, d), as the keys
                key = block.key_value(block.norm(x))[0]
                weights.append((query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1))
        return torch.stack(weights, 1)


def attention_maps(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """The patch columns of `attention_weights`, in the shape of the image: (B, blocks, 1 + M, h, w)."""
    patches = attention_weights(model, images)[..., model.encoder.vision_tower.num_prefix : -model.config.n_ctx]
    return patches.unflatten(-1, model.encoder.vision_tower.grid)
