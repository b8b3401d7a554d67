"""DCP as one of the methods: trained by the loop, rounded as it will be stored, with the stored statistics measured."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

from dcp_zoo.errors import ZooError
from dcp_zoo.files import format_duration
from dcp_zoo.model.dcp import DCP
from dcp_zoo.training import distributed
from dcp_zoo.training.device import cast_frozen, needs_checkpointing, peak_memory, total_memory
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.heads import HeadClassifier, as_of, warn_if_not_learnt
from dcp_zoo.training.recipes import batch_sizes
from dcp_zoo.training.sources import ImageSource, Progress, encode_views
from dcp_zoo.training.stage import image_features

MEASURED_STEPS = 4  # before their time is told


def fit(
    task: Task,
    *,
    grad_checkpointing: str = "auto",
    reload_clip: Callable[[], Any] | None = None,
    log: Callable[[str], object] = str,
    **options: Any,
) -> HeadClassifier:
    """Train a DCP from fresh prompts, round the trained tensors to float16, and measure the stored statistics. With
    `reload_clip`, which returns CLIP with float32 weights again, CLIP is stored in half precision only while training
    in it; otherwise, autocast converts it on the fly. For `grad_checkpointing` see `needs_checkpointing`, for
    `options` see `loop.train`."""
    model, recipe = new_model(task), task.recipe
    source, fixed = task.train_images.for_model(model), task.plain_train.for_model(model)
    per_epoch = len(batch_sizes(len(source.items), recipe.batch_size, recipe.drop_last))
    steps, trained = recipe.num_epochs * per_epoch, sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"{steps:,} steps of at most {recipe.batch_size} images; {trained:,} trainable parameters")
    if source.views is not None or recipe.augment != "crop-flip":
        source, fixed = frozen_tokens(source, fixed, task.progress)
    batch = -(-min(recipe.batch_size, len(source.items)) // distributed.world_size())
    model.set_grad_checkpointing(needs_checkpointing(grad_checkpointing, model, batch))
    if recipe.clip_reg:
        source.targets = fixed.targets = image_features(fixed, task.progress, model.encode_prompted)
    if reload_clip:
        cast_frozen(model, task.precision)
    options |= {"seed": task.seed, "precision": task.precision, "progress": estimated(task, log)}
    losses = train(source, recipe, validation=task.val, **options)
    model.set_grad_checkpointing(False)
    if not distributed.is_main():
        return HeadClassifier(model, task, fixed, {})
    warn_if_not_learnt(fmean(losses[-per_epoch:]), source.num_classes, "epochs", recipe.num_epochs)
    if reload_clip and task.precision != "float32":  # the statistics are measured as the head will be used
        for own, loaded in zip(model.clip.parameters(), reload_clip().parameters(), strict=True):
            own.data = loaded.data  # the cast weights are freed
    round_and_store_stats(fixed)
    tenth = max(1, len(losses) // 10)  # enough to tell later whether it learnt
    info = {"first_loss": fmean(losses[:tenth]), "last_loss": fmean(losses[-tenth:])}
    return HeadClassifier(model, task, fixed, info)


def estimated(task: Task, log: Callable[[str], object]) -> Progress:
    """The task's progress bar; after a few steps the log says how long all of them take, and what is faster."""
    faster = [] if task.recipe.prompted_blocks else ["the recipe fast"]
    advice = " or ".join([*faster, "the method text-probe, which takes seconds"])

    def wrapped(steps: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        started = 0.0
        for n, step in enumerate(task.progress(steps, description, total)):
            if n == 1:  # the first step is slower
                started = perf_counter()
            elif n == MEASURED_STEPS:
                seconds, memory = (perf_counter() - started) / (n - 1), peak_memory(task.clip.device) / 2**30
                left = format_duration(seconds * (total - n))
                log(f"{seconds:.2g} s per step, {memory:.1f} GB of memory: about {left} left. Faster: {advice}.")
            yield step

    return wrapped


def frozen_tokens(source: ImageSource, fixed: ImageSource, progress: Progress) -> tuple[ImageSource, ImageSource]:
    """With late coupling: the images of both sources as the tokens that enter the first block with prompts, of every
    view, in half precision; the images themselves if all tokens take more than a quarter of the memory."""
    model = source.model
    numbers = source.num_views * len(source.items) * model.vision_tower.num_tokens * model.vision_tower.width
    if model.first_block == 0 or 2 * numbers > total_memory(torch.device("cpu")) / 4:
        return source, fixed

    def enter(images: torch.Tensor, patches: bool) -> torch.Tensor:
        return model.enter(images, patches).half()

    tokens = encode_views(source, enter, source.flips, progress)
    return replace(source, views=tokens, flips=False), replace(fixed, views=tokens)


def new_model(task: Task) -> DCP:
    """The task's CLIP with fresh prompts."""
    described = None if isinstance(task.template, str) else task.template
    clip = task.clip
    model = DCP(clip.clip, task.classnames, task.recipe.config, tokenizer=clip.tokenizer, descriptions=described)
    return as_of(clip, model)


@torch.no_grad()
def round_and_store_stats(source: ImageSource) -> None:
    """After training: round the trained tensors to float16, as they will be stored, and measure the stored statistics
    on the unaugmented training images. ZooError for numbers beyond float16's range: training diverged."""
    model = source.model
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
