"""What methods share that train a small part of CLIP's own weights, in a copy of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import Texts, check_classnames, class_texts, mean_of_texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.backbone.tokens import end_positions
from dcp_zoo.backbone.towers.open_clip import OpenClipViT
from dcp_zoo.backbone.towers.text import shares_prefix
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.loop import cosine
from dcp_zoo.training.methods.base import Loss, Task, minimise, shuffled
from dcp_zoo.training.recipes import BaseRecipe, changed, count, option
from dcp_zoo.training.sources import ImageSource

FINAL_LR = 1e-6  # of CLIP-LoRA, CLIP-SVD and 2SFS


@dataclass(frozen=True)
class AdamWRecipe(BaseRecipe):
    """AdamW with a cosine down to `FINAL_LR`, as in the authors' code of CLIP-LoRA, CLIP-SVD and 2SFS."""

    augment: str = changed(BaseRecipe, "augment", "crop-flip")
    lr: float = option(2e-4, "learning rate of the first step, in each stage if there are several")
    weight_decay: float = option(1e-2, "decoupled weight decay")
    batch_size: int = count(32, "images per step")
    steps: int = count(2000, "training steps, of all stages; this many for 4 images per class, in proportion to them")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "AdamWRecipe":
        return cls(steps=cls.steps * shots // 4)


def both_blocks(clip: FrozenCLIP) -> list[Any]:
    """The modules of the blocks of both towers, text first."""
    return [block.module for tower in (clip.text_tower, clip.vision_tower) for block in tower.blocks]


def check_blocks(clip: FrozenCLIP, method: str) -> None:
    """Raise ZooError unless both towers are open_clip's own, the text tower a causal one."""
    if not (isinstance(clip.vision_tower, OpenClipViT) and shares_prefix(clip.text)):
        lacking = "blocks of open_clip's own ViT and causal text tower, which this CLIP does not have"
        raise ZooError(f"{method} updates the {lacking}: use 2sfs, tip-adapter-f or clap instead.")


def sentence_ids(clip: FrozenCLIP, names: Sequence[str], texts: Texts) -> tuple[Tensor, Sequence[int] | None]:
    """Token ids (S, L) of the template filled with each name, or of the sentences of each class, and how many each has,
    see `class_texts`; in a causal tower cut after the longest, as tokens after an end token have no effect there."""
    sentences, counts = class_texts(names, texts)
    ids = clip.tokenize(sentences)
    return (ids[:, : int(end_positions(clip.text, ids).max()) + 1] if shares_prefix(clip.text) else ids), counts


def sentence_features(clip: FrozenCLIP, ids: Tensor) -> Tensor:
    """ids (S, L) -> text features (S, E), not normalised; gradients reach all weights that require them."""
    if not shares_prefix(clip.text):
        return clip.clip.encode_text(ids, normalize=False)
    text = clip.text
    y = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
    for block in clip.text_tower.blocks:
        y = block(y, causal=True)
    return clip.text_tower.project(y[torch.arange(len(y), device=y.device), end_positions(text, ids)])


def train_steps(task: Task, trained: Iterable[Tensor], loss: Loss, source: ImageSource, steps: int) -> list[float]:
    """AdamW with a cosine from the recipe's learning rate to `FINAL_LR`; returns the loss of every step."""
    recipe = task.recipe
    optimizer = torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay)
    batches = shuffled(source, recipe.batch_size, task.seed)
    return minimise(task, loss, optimizer, batches, cosine(recipe.lr, steps, FINAL_LR), steps)


def train_weights(clip: FrozenCLIP, task: Task, trained: Iterable[Tensor], steps: int) -> list[float]:
    """Train these weights of a CLIP by zero-shot classification, encoding images and sentences in every step."""
    ids, counts = sentence_ids(task.clip, check_classnames(task.classnames), task.texts)

    def loss(inputs: Inputs, labels: Tensor) -> Tensor:
        text = mean_of_texts(F.normalize(sentence_features(clip, ids), dim=-1), counts)
        logits = task.clip.logits(clip.encode_image(inputs), text)
        return F.cross_entropy(logits.float(), labels)

    losses = train_steps(task, trained, loss, task.train_images, steps)
    clip.requires_grad_(False).zero_grad(set_to_none=True)
    return losses


def zero_shot_of(clip: FrozenCLIP, task: Task) -> LinearHead:
    """Zero-shot classification by a copy of CLIP that was trained."""
    text = clip.zero_shot_classifier(check_classnames(task.classnames), task.texts)
    return task.text_head(text, clip=clip, texts=task.texts)
