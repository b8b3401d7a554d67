"""The stored statistics: measured once on the training images, CMPA reads them instead of those of the batch, as
BatchNorm reads its running statistics.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dcp_zoo.errors import ZooError

ImageBatches = Tensor | Iterable[Any]


@torch.no_grad()
def measure_stats(model: Any, images: ImageBatches, patches: bool = False) -> Tensor | None:
    """The pooled vision prompts (K, M, Dv) before each coupled block, of all images as one batch."""
    chunks: Iterable[Any] = images.split(64) if isinstance(images, Tensor) else images
    if iter(chunks) is chunks:
        raise ZooError("store_stats reads the images once for every block: pass a tensor, a list or a DataLoader.")
    prompts: list[Tensor] = []  # prompts that enter blocks 0, 1, ...
    pooled: list[Tensor] = []

    def leaving_prompts(chunk: Any) -> Tensor:
        """The prompts (b, M, Dv) that leave the last block for which the entering prompts are known."""
        inputs = (chunk[0] if isinstance(chunk, (tuple, list)) else chunk).to(model.device)
        x = model.vision_tower.run(model.vision_tower.embed(inputs, patches), prompts, stop=len(prompts))
        return x[:, -model.config.n_ctx :].float()

    def measure(i: int) -> Tensor:
        pooled.append(_pool_stream(map(leaving_prompts, chunks), model.config.pooling))
        return pooled[-1]

    training = model.training
    model.eval()
    try:
        for step in model.couplings(measure):
            if step.new_v is not None:
                prompts.append(step.new_v)
    finally:
        model.train(training)
    return torch.stack(pooled) if pooled else None


def _pool_stream(states: Iterable[Tensor], pooling: str) -> Tensor:
    """A stream of batches (b, M, Dv), pooled as a single batch -> (M, Dv)."""
    total, count = None, 0
    for v in states:
        if pooling == "first":
            return v[0]
        part = v.sum(0) if pooling == "mean" else v.amax(0)
        join = torch.add if pooling == "mean" else torch.maximum
        total = part if total is None else join(total, part)
        count += len(v)
    if total is None:
        raise ZooError("store_stats needs at least one image.")
    return total / count if pooling == "mean" else total
