"""The calibrated context: what CMPA reads instead of the images at hand, measured once on the training images."""

from collections.abc import Iterable
from typing import Any

import torch

from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import DCP, Images


@torch.no_grad()
def measure_context(model: DCP, images: Images) -> torch.Tensor | None:
    """The fused vision prompts (K, M, Dv) before each coupled block, all images being one batch.

    See `DCP.calibrate` for the images and the errors.
    """
    chunks: Iterable[Any] = images.split(64) if isinstance(images, torch.Tensor) else images
    if iter(chunks) is chunks:
        raise ZooError("calibrate reads the images once for every block: give a tensor, a list or a DataLoader.")
    training = model.training
    model.eval()
    contexts: list[torch.Tensor] = []
    vision_prompts = [model._first_prompts()]
    y = model._embed_prefix()
    for i in range(1, model.coupled + 1):
        y, _ = model._prefix_block(i - 1, y)
        states = (_prompts_after(model, _images_of(chunk), vision_prompts) for chunk in chunks)
        contexts.append(_fuse_stream(states, model.fusing))
        v, y = model._couple(i, contexts[-1], y)
        vision_prompts.append(v)
    model.train(training)
    return torch.cat(contexts) if contexts else None


def _prompts_after(model: DCP, images: torch.Tensor, vision_prompts: list[torch.Tensor]) -> torch.Tensor:
    """What the block behind the last of the given prompts makes of them (b, M, Dv), in float32."""
    images = images.to(model.prompts["vision"].device)
    return model._vision_with(vision_prompts, images, stop=len(vision_prompts))[:, -model.n_ctx :].float()


def _fuse_stream(states: Iterable[torch.Tensor], fusing: str) -> torch.Tensor:
    """Batches (b, M, Dv) that come one after the other, fused as if they were one -> (1, M, Dv)."""
    total, count = None, 0
    for v in states:
        if fusing == "first":
            return v[:1]
        part = v.sum(0, keepdim=True) if fusing == "mean" else v.amax(0, keepdim=True)
        join = torch.add if fusing == "mean" else torch.maximum
        total = part if total is None else join(total, part)
        count += len(v)
    if total is None:
        raise ZooError("calibrate needs at least one image.")
    return total / count if fusing == "mean" else total


def _images_of(chunk: Any) -> torch.Tensor:
    return chunk[0] if isinstance(chunk, (tuple, list)) else chunk
