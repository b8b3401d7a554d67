"""Shared by CLAP, ProLIP, CLIP-LoRA, PromptSRC and 2SFS: a trainable copy of CLIP, towers whose weights get gradients,
and gradient descent on a custom loss.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F

from dcp_zoo.model._linear import linear
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts, check_classnames, class_texts, end_positions
from dcp_zoo.model.towers.blocks import Block, split_heads
from dcp_zoo.model.towers.text import shares_prefix
from dcp_zoo.training.device import autocast
from dcp_zoo.training.loop import check_finite_loss
from dcp_zoo.training.methods.base import CosineClassifier, Task, encode_images
from dcp_zoo.training.sources import ImageSource

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (inputs, labels) of a batch -> its loss
Update = Callable[[torch.Tensor], torch.Tensor]  # see `attention_block`

# ------------------------------------------------------------------------------------------------------- a copy of CLIP


def own_clip(clip: FrozenCLIP) -> FrozenCLIP:
    """A copy of a CLIP that a method may train; the shared one is never changed."""
    return FrozenCLIP(copy.deepcopy(clip.clip), clip.tokenizer, clip.pretrained_cfg)


class AdaptedCLIP(CosineClassifier):
    """Zero-shot classification with an adapted CLIP: cosine of its image features and its text features of the class
    names in the dataset's template."""

    def __init__(self, task: Task, clip: FrozenCLIP) -> None:
        super().__init__(task)
        self.clip, self.template = clip, task.template
        self.set_classnames(task.classnames)

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.template = template or self.template
        self.text = self.clip.zero_shot_classifier(check_classnames(classnames), self.template)

    def features(self, source: ImageSource) -> torch.Tensor:
        """Features of the adapted CLIP; not cached with the source, which other methods share."""
        return encode_images(self.clip, source, self.progress)


# ------------------------------------------------------------------------------------------------ towers with gradients


def attention_block(block: Block, x: torch.Tensor, causal: bool = False, update: Update | None = None) -> torch.Tensor:
    """One block, computed as in open_clip: x (B, L, D) -> (B, L, D).

    `update` maps the normalised input (B, L, D) to an addition to queries, keys and values (B, L, 3 D).
    """
    attn, normed = block.module.attn, block.norm(x)
    qkv = linear(normed, attn.in_proj_weight, attn.in_proj_bias)
    if update is not None:
        qkv = qkv + update(normed)
    query, key, value = (split_heads(part, attn.num_heads) for part in qkv.chunk(3, -1))
    return block.finish(x, F.scaled_dot_product_attention(query, key, value, is_causal=causal))


def sentence_ids(
    clip: FrozenCLIP, classnames: Sequence[str], template: Texts
) -> tuple[torch.Tensor, Sequence[int] | None]:
    """Token ids (S, L) of the template filled with each name, or of the sentences of each class, and how many each has,
    see `class_texts`. In a causal tower they are cut after the longest: there, tokens after an end token have no
    effect."""
    sentences, counts = class_texts(classnames, template)
    ids = clip.tokenize(sentences)
    return (ids[:, : int(end_positions(clip.text, ids).max()) + 1] if shares_prefix(clip.text) else ids), counts


def sentence_features(clip: FrozenCLIP, ids: torch.Tensor, updates: Sequence[Update | None] = ()) -> torch.Tensor:
    """ids (S, L) -> text features (S, E), not normalised; gradients reach all weights that require them.

    `updates`: one per block of a causal tower, see `attention_block`.
    """
    if not shares_prefix(clip.text):
        return clip.clip.encode_text(ids, normalize=False)
    text, blocks = clip.text, clip.text_tower.blocks
    updates = updates or [None] * len(blocks)
    y = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
    for block, update in zip(blocks, updates, strict=True):
        y = attention_block(block, y, causal=True, update=update)
    return clip.text_tower.project(text.ln_final(y[torch.arange(len(y), device=y.device), end_positions(text, ids)]))


# ----------------------------------------------------------------------------------------------------- gradient descent


def shuffled(source: ImageSource, batch_size: int, seed: int, drop_last: bool = True) -> Iterator[Any]:
    """An endless stream of (inputs, labels) batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from source.batches(batch_size, generator, drop_last=drop_last)


@torch.no_grad()
def as_features(clip: FrozenCLIP, inputs: torch.Tensor, patches: bool) -> torch.Tensor:
    """A batch of features (B, E) as it is, images or patch maps as their features in a frozen image tower."""
    return inputs if inputs.ndim == 2 else clip.encode_image(inputs, patches=patches)


def cosine(peak: float, steps: int, floor: float = 0.0) -> Callable[[int], float]:
    """A schedule: the learning rate of each step, from `peak` to `floor` along half a cosine."""
    return lambda step: floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2


def descend(
    task: Task,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss: Loss,
    lr_at: Callable[[int], float],
    steps: int,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Gradient descent, one step per batch.

    Args:
        task: provides device, precision and progress bar.
        optimizer: holds the trained parameters.
        batches: at least `steps` pairs (inputs, labels).
        loss: of one batch, on the task's device.
        lr_at: learning rate of a step, counted from 0.
        steps: number of steps.
        after: called after each step with its number.

    Returns:
        The loss of every step.

    Raises:
        ZooError: the loss is no longer finite.
    """
    device, losses = task.clip.device, []
    scaler = torch.amp.GradScaler(device.type, enabled=task.precision == "float16" and device.type != "mps")
    for step, (inputs, labels) in enumerate(task.progress(islice(batches, steps), "training", steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        with autocast(device, task.precision):
            value = loss(inputs.to(device), labels.to(device))
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(check_finite_loss(value.item(), step, "--set lr=..."))
        after(step)
    return losses
