"""The calibrated context: measured once on the training images, CMPA reads it instead of the current batch.

It corresponds to BatchNorm's running statistics, as the batch context does to the statistics of a batch.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcp_zoo.errors import ZooError

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP

ImageBatches = Tensor | Iterable[Any]


@torch.no_grad()
def measure_context(model: "DCP", images: ImageBatches, patches: bool = False) -> Tensor | None:
    """The pooled vision prompts (K, M, Dv) before each coupled block, for all images as one batch: `DCP.calibrate`."""
    chunks: Iterable[Any] = images.split(64) if isinstance(images, Tensor) else images
    if iter(chunks) is chunks:
        raise ZooError("calibrate reads the images once for every block: pass a tensor, a list or a DataLoader.")
    prompts: list[Tensor] = []  # prompts that enter blocks 0, 1, ...
    contexts: list[Tensor] = []

    def leaving_prompts(chunk: Any) -> Tensor:
        """The prompts (b, M, Dv) that leave the last block for which the entering prompts are known."""
        inputs = (chunk[0] if isinstance(chunk, (tuple, list)) else chunk).to(model.device)
        x = model.vision_tower.run(model.vision_tower.embed(inputs, patches), prompts, stop=len(prompts))
        return x[:, -model.config.n_ctx :].float()

    def measure(i: int) -> Tensor:
        contexts.append(_pool_stream(map(leaving_prompts, chunks), model.config.fusing))
        return contexts[-1]

    training = model.training
    model.eval()
    try:
        for step in model.couplings(measure):
            if step.new_v is not None:
                prompts.append(step.new_v)
    finally:
        model.train(training)
    return torch.stack(contexts) if contexts else None


def _pool_stream(states: Iterable[Tensor], fusing: str) -> Tensor:
    """A stream of batches (b, M, Dv), pooled as a single batch -> (M, Dv)."""
    total, count = None, 0
    for v in states:
        if fusing == "first":
            return v[0]
        part = v.sum(0) if fusing == "mean" else v.amax(0)
        join = torch.add if fusing == "mean" else torch.maximum
        total = part if total is None else join(total, part)
        count += len(v)
    if total is None:
        raise ZooError("calibrate needs at least one image.")
    return total / count if fusing == "mean" else total
