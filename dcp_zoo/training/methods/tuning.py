"""Shared by methods that train with a loss of their own: a trainable copy of CLIP, text features with gradients,
batches, and two schedules.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts, check_classnames, class_texts, end_positions, mean_of_texts
from dcp_zoo.model.towers.blocks import Block
from dcp_zoo.model.towers.text import shares_prefix
from dcp_zoo.training.loop import build_optimizer, cosine, descend
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.sources import ImageSource
from dcp_zoo.training.state import TrainingState

FINAL_LR = 1e-6  # of CLIP-LoRA and 2SFS
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # inputs and labels of a batch -> its loss


def own_clip(clip: FrozenCLIP) -> FrozenCLIP:
    """A copy of a CLIP that a method may train; the shared one is never changed."""
    return FrozenCLIP(copy.deepcopy(clip.clip), clip.tokenizer, clip.pretrained_cfg)


def sentence_ids(
    clip: FrozenCLIP, classnames: Sequence[str], template: Texts
) -> tuple[torch.Tensor, Sequence[int] | None]:
    """Token ids (S, L) of the template filled with each name, or of the sentences of each class, and how many each has,
    see `class_texts`; in a causal tower cut after the longest, as tokens after an end token have no effect there."""
    sentences, counts = class_texts(classnames, template)
    ids = clip.tokenize(sentences)
    return (ids[:, : int(end_positions(clip.text, ids).max()) + 1] if shares_prefix(clip.text) else ids), counts


def sentence_features(clip: FrozenCLIP, ids: torch.Tensor, blocks: Sequence[Block] = ()) -> torch.Tensor:
    """ids (S, L) -> text features (S, E), not normalised; gradients reach all weights that require them, and those of
    `blocks`, which take the place of a causal tower's."""
    if not shares_prefix(clip.text):
        return clip.clip.encode_text(ids, normalize=False)
    text = clip.text
    y = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
    for block in blocks or clip.text_tower.blocks:
        y = block(y, causal=True)
    return clip.text_tower.project(text.ln_final(y[torch.arange(len(y), device=y.device), end_positions(text, ids)]))


def shuffled(source: ImageSource, batch_size: int, seed: int, drop_last: bool = True) -> Iterator[Any]:
    """An endless stream of (inputs, labels) batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from source.batches(batch_size, generator, drop_last=drop_last)


@torch.no_grad()
def as_features(clip: FrozenCLIP, inputs: torch.Tensor, patches: bool) -> torch.Tensor:
    """A batch of features (B, E) as it is, images or patch maps as their features in a frozen image tower."""
    return inputs if inputs.ndim == 2 else clip.encode_image(inputs, patches=patches)


def zero_shot_loss(
    task: Task, encode_image: Callable[..., torch.Tensor], encode_text: Callable[[torch.Tensor], torch.Tensor]
) -> Loss:
    """Cross-entropy of zero-shot classification with the towers that a method trains: images and token ids (S, L) are
    encoded as normalised features in every step."""
    ids, counts = sentence_ids(task.clip, check_classnames(task.classnames), task.template)
    patches = task.train_images.patches

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        text = mean_of_texts(encode_text(ids), counts)
        logits = task.clip.logits(encode_image(images, patches=patches), text)
        return F.cross_entropy(logits.float(), labels)

    return loss


def train_steps(
    task: Task, trained: Iterable[torch.Tensor], loss: Loss, source: ImageSource, steps: int
) -> list[float]:
    """AdamW with a cosine from the recipe's learning rate to `FINAL_LR`; returns the loss of every step."""
    recipe = task.recipe
    optimizer = torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay)
    state, batches = TrainingState().begin(optimizer, task.precision), shuffled(source, recipe.batch_size, task.seed)
    return descend(state, loss, batches, cosine(recipe.lr, steps, FINAL_LR), steps, task.progress)


def train_epochs(
    task: Task,
    trained: Iterable[torch.Tensor],
    loss: Loss,
    batches: Iterable[Any],
    per_epoch: int,
    after: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """A `TrainingRecipe`'s optimizer and schedule by epochs of so many batches; `after` as in `descend`."""
    recipe = task.recipe
    state = TrainingState().begin(build_optimizer(recipe, trained), task.precision)
    steps = recipe.num_epochs * per_epoch
    return descend(state, loss, batches, lambda step: recipe.lr_at(step // per_epoch), steps, task.progress, after)
