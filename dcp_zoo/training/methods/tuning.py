"""Shared by methods that train with a loss of their own: a trainable copy of CLIP, towers whose weights get gradients,
and batches.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts, check_classnames, class_texts, end_positions
from dcp_zoo.model.towers.blocks import Block
from dcp_zoo.model.towers.text import shares_prefix
from dcp_zoo.training.methods.base import CosineClassifier, Task, encode_images
from dcp_zoo.training.sources import ImageSource

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


def sentence_ids(
    clip: FrozenCLIP, classnames: Sequence[str], template: Texts
) -> tuple[torch.Tensor, Sequence[int] | None]:
    """Token ids (S, L) of the template filled with each name, or of the sentences of each class, and how many each has,
    see `class_texts`. In a causal tower they are cut after the longest: there, tokens after an end token have no
    effect."""
    sentences, counts = class_texts(classnames, template)
    ids = clip.tokenize(sentences)
    return (ids[:, : int(end_positions(clip.text, ids).max()) + 1] if shares_prefix(clip.text) else ids), counts


def sentence_features(clip: FrozenCLIP, ids: torch.Tensor, blocks: Sequence[Block] = ()) -> torch.Tensor:
    """ids (S, L) -> text features (S, E), not normalised; gradients reach all weights that require them.

    `blocks` take the place of those of a causal tower.
    """
    if not shares_prefix(clip.text):
        return clip.clip.encode_text(ids, normalize=False)
    text = clip.text
    y = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
    for block in blocks or clip.text_tower.blocks:
        y = block(y, causal=True)
    return clip.text_tower.project(text.ln_final(y[torch.arange(len(y), device=y.device), end_positions(text, ids)]))


# -------------------------------------------------------------------------------------------------------------- batches


def shuffled(source: ImageSource, batch_size: int, seed: int, drop_last: bool = True) -> Iterator[Any]:
    """An endless stream of (inputs, labels) batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from source.batches(batch_size, generator, drop_last=drop_last)


@torch.no_grad()
def as_features(clip: FrozenCLIP, inputs: torch.Tensor, patches: bool) -> torch.Tensor:
    """A batch of features (B, E) as it is, images or patch maps as their features in a frozen image tower."""
    return inputs if inputs.ndim == 2 else clip.encode_image(inputs, patches=patches)
