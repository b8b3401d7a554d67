"""Shared by methods that train with a loss of their own: a trainable copy of CLIP, towers whose weights get gradients,
and batches.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from dcp_zoo.model._linear import linear
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts, check_classnames, class_texts, end_positions
from dcp_zoo.model.towers.blocks import Block, split_heads
from dcp_zoo.model.towers.text import shares_prefix
from dcp_zoo.training.methods.base import CosineClassifier, Task, encode_images
from dcp_zoo.training.sources import ImageSource

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
