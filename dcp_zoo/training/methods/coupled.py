"""DCP as one of the methods: trained by the loop, rounded as it will be stored, with the stored statistics measured."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import torch

from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import DCP
from dcp_zoo.training import distributed
from dcp_zoo.training.device import cast_frozen, total_memory
from dcp_zoo.training.fit_probe import probe_views
from dcp_zoo.training.methods.base import Task, train_prompts
from dcp_zoo.training.sources import ImageSource, Progress, encode_views


def fit(task: Task) -> DCP:
    """Train a DCP from fresh prompts, round the trained tensors to float16, and measure the stored statistics. With the
    task's `reload_clip` CLIP is stored in half precision only while training in it; otherwise, autocast converts it on
    the fly."""
    model, recipe = new_model(task), task.recipe
    source, fixed = task.train_images.for_model(model), task.plain_train.for_model(model)
    if not source.crops:
        source, fixed = frozen_tokens(source, fixed, task.progress)
    if recipe.clip_reg:
        shown = max(source.num_views, probe_views(fixed))
        source.targets = fixed.targets = encode_views(fixed, model.encode_prompted, shown, task.progress).float()
    task.probe_images = fixed
    if task.reload_clip:
        cast_frozen(model, task.precision)
    losses = train_prompts(task, model, source)
    if not distributed.is_main():
        return model
    if task.reload_clip and task.precision != "float32":  # the statistics are measured as the head will be used
        for own, loaded in zip(model.clip.parameters(), task.reload_clip().clip.parameters(), strict=True):
            own.data = loaded.data  # the cast weights are freed
    round_and_store_stats(model, fixed)
    tenth = max(1, len(losses) // 10)  # enough to tell later whether it learnt
    model.info = {"first_loss": fmean(losses[:tenth]), "last_loss": fmean(losses[-tenth:])}
    return model


def frozen_tokens(source: ImageSource, fixed: ImageSource, progress: Progress) -> tuple[ImageSource, ImageSource]:
    """With late coupling: the images of both sources as the tokens that enter the first block with prompts, of every
    view, in half precision; the images themselves if all tokens take more than a quarter of the memory."""
    model = source.model
    assert isinstance(model, DCP)
    numbers = source.num_views * len(source.items) * model.vision_tower.num_tokens * model.vision_tower.width
    if model.first_block == 0 or 2 * numbers > total_memory(torch.device("cpu")) / 4:
        return source, fixed

    def enter(images: torch.Tensor, patches: bool) -> torch.Tensor:
        return model.enter(images, patches).half()

    tokens = encode_views(source, enter, source.num_views, progress)
    return replace(source, views=tokens, flips=False), replace(fixed, views=tokens)


def new_model(task: Task) -> DCP:
    """The task's CLIP with fresh prompts."""
    described = task.template if isinstance(task.template, Mapping) else None
    clip = task.clip
    return DCP(clip.clip, task.classnames, task.recipe.config, tokenizer=clip.tokenizer, descriptions=described)


@torch.no_grad()
def round_and_store_stats(model: DCP, source: ImageSource) -> None:
    """After training: round the trained tensors to float16, as they will be stored, and measure the stored statistics
    on the unaugmented training images. ZooError for numbers beyond float16's range: training diverged."""
    for tensor in model.head_state().values():
        tensor.copy_(tensor.half())
    model.store_stats(source.batches(64), patches=source.patches)
    if model.stored_stats is not None:
        model.stored_stats.copy_(model.stored_stats.half())
    if not all(tensor.isfinite().all() for tensor in model.head_state().values()):
        raise ZooError(
            "Training diverged: the prompts became too large for float16. Lower the learning rate (--set lr=...), and "
            "start again (--overwrite)."
        )
