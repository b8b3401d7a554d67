"""Make a trained head: train a DCP, round it as it will be stored, calibrate it, and fit its classifier stage."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from dcp_zoo.errors import ZooError
from dcp_zoo.training import distributed
from dcp_zoo.training.device import cast_frozen, needs_checkpointing
from dcp_zoo.training.loop import train
from dcp_zoo.training.recipes import Recipe, batch_sizes
from dcp_zoo.training.sources import ImageSource, Progress, no_progress, plain_view
from dcp_zoo.training.stage import fit_stage, image_features

NOT_LEARNT = 0.4  # of the loss of a random guess


def fit_dcp(
    source: ImageSource,
    recipe: Recipe,
    *,
    val: ImageSource | None = None,
    seed: int = 1,
    precision: str = "float32",
    grad_checkpointing: str = "auto",
    reload_clip: Callable[[], Any] | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> dict[str, Any]:
    """Train a DCP from fresh prompts, round the trained tensors to float16, calibrate, and fit the classifier stage:
    ready to be saved.

    Args:
        source: see `train`.
        val: few-shot validation images for the classifier stage, see `fit_stage`, and for the callbacks.
        recipe, seed, precision, progress, options: see `train`.
        grad_checkpointing: "on", "off" or "auto", see `memory.needs_checkpointing`.
        reload_clip: returns CLIP with float32 weights again. If given, CLIP is stored in half precision only while
            training in it; otherwise, autocast converts it on the fly.

    Returns:
        How the classifier stage was fitted, if the recipe has one; see `fit_stage`.

    Raises:
        ZooError: see `train`.
    """
    model = source.model
    batch = -(-min(recipe.batch_size, len(source.items)) // distributed.world_size())
    model.set_grad_checkpointing(needs_checkpointing(grad_checkpointing, model, batch))
    # the training images without random crops, in order
    fixed = source if source.views is not None else plain_view(source, progress)
    if recipe.clip_reg:
        source.targets = fixed.targets = image_features(fixed, progress, model.encode_prompted)
    if reload_clip:
        cast_frozen(model, precision)
    losses = train(source, recipe, seed=seed, precision=precision, progress=progress, validation=val, **options)
    model.set_grad_checkpointing(False)
    if not distributed.is_main():
        return {}
    recipe = recipe.fitted(len(source.items), source.num_classes)
    last = losses[-len(batch_sizes(len(source.items), recipe.batch_size, recipe.drop_last)) :]
    warn_if_not_learnt(sum(last) / len(last), source.num_classes, "epochs", recipe.num_epochs)
    if reload_clip and precision != "float32":  # a checkpoint is calibrated as it will be used
        model.clip = reload_clip()
    round_and_store_stats(fixed)
    if recipe.classifier == "none":
        return {}
    return {"classifier": fit_stage(fixed, val, progress)}


@torch.no_grad()
def round_and_store_stats(source: ImageSource, batch_size: int = 64) -> None:
    """After training: round the trained tensors to float16, as they will be stored, and measure the stored statistics.

    Args:
        source: the few-shot training images without augmentation, and the trained model.

    Raises:
        ZooError: prompts, or the context, beyond float16's range: training diverged.
    """
    model = source.model
    for tensor in model.head_state().values():
        tensor.copy_(tensor.half())
    model.store_stats(source.batches(batch_size), patches=source.patches)
    if model.stored_stats is not None:
        model.stored_stats.copy_(model.stored_stats.half())
    if not all(tensor.isfinite().all() for tensor in model.head_state().values()):
        raise ZooError(
            "Training diverged: the prompts became too large for float16. Lower the learning rate (--set lr=...), and "
            "start again (--overwrite)."
        )


def warn_if_not_learnt(loss: float, classes: int, length: str, value: int) -> None:
    """Warn, with the next step, if the loss on the training images at the end is above `NOT_LEARNT` of that of a random
    guess among the classes. The recipe's field `length` had this `value`."""
    guess = math.log(max(classes, 2))
    if loss > NOT_LEARNT * guess:
        warnings.warn(
            f"The training images are not learnt: their loss is {loss:.2f} at the end, where guessing gives "
            f"{guess:.2f}. Train longer (--set {length}={3 * value}; in Python recipe={{'{length}': {3 * value}}}), or "
            "check that the labels are right.",
            stacklevel=3,
        )
