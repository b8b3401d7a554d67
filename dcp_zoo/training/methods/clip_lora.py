"""CLIP-LoRA (Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPR Workshops 2024):
low-rank updates of the attention weights in both towers, trained through the dataset's prompt template.

In every block of both towers, the query, key and value projections W (D, D) of the normalised input x (.., D) each get
an update with A (r, D), B (D, r) and its own dropout:

    W x + gamma B A dropout(x),  gamma = alpha / sqrt(r)                 (.., D)

A is initialised like a linear layer's weight and B to 0. The loss is the cross-entropy of the zero-shot logits s f
W^T, with text features recomputed in every step. Afterwards gamma B A is merged into a copy of CLIP, which is then an
ordinary CLIP that accepts any class names. No model selection: the last step is used.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.towers.blocks import KeyValue, OpenClipBlock, split_heads
from dcp_zoo.model.towers.text import shares_prefix
from dcp_zoo.model.towers.vision import OpenClipViT
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.recipes import CLIPLoRARecipe
from dcp_zoo.training.methods.tuning import own_clip, sentence_features, train_steps, zero_shot_loss
from dcp_zoo.training.methods.zero_shot import ZeroShot


class LowRank(nn.Module):
    """Updates of the queries, keys and values of a block: x (.., D) -> (.., 3 D)."""

    def __init__(self, width: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = alpha / rank**0.5, dropout
        self.a = nn.Parameter(torch.empty(3, rank, width).uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.Parameter(torch.zeros(3, width, rank))

    def forward(self, x: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Of queries, keys and values those in `rows`, by default all."""
        pairs = zip(self.a[rows], self.b[rows], strict=True)
        return self.scale * torch.cat([F.dropout(x, self.dropout, self.training) @ a.T @ b.T for a, b in pairs], -1)

    def merged(self) -> torch.Tensor:
        """The same without dropout, as a matrix (3 D, D) to add to the block's `in_proj_weight`."""
        return self.scale * (self.b @ self.a).flatten(0, 1)


class LowRankBlock(OpenClipBlock):
    """A block of CLIP with updates of its queries, keys and values."""

    def __init__(self, module: nn.Module, update: Any) -> None:
        super().__init__(module)
        self.update = update

    def query(self, normed: torch.Tensor, rotate: bool = True) -> torch.Tensor:
        query = super().query(normed)
        return query + split_heads(self.update(normed, slice(1)), query.shape[-3])

    def key_value(self, normed: torch.Tensor, rotate: bool = True) -> KeyValue:
        key, value = super().key_value(normed)
        more_key, more_value = self.update(normed, slice(1, None)).chunk(2, -1)
        heads = key.shape[-3]
        return key + split_heads(more_key, heads), value + split_heads(more_value, heads)


class LoRA(nn.Module):
    """A frozen CLIP with trainable low-rank updates in all blocks of both towers."""

    def __init__(self, clip: FrozenCLIP, recipe: CLIPLoRARecipe) -> None:
        super().__init__()
        if not (isinstance(clip.vision_tower, OpenClipViT) and shares_prefix(clip.text)):
            raise ZooError(
                "CLIP-LoRA updates the attention of open_clip's own ViT and causal text tower, which this CLIP does "
                "not have: use 2sfs, tip-adapter-f or clap instead."
            )
        self.clip = clip
        self.text, self.vision = (
            nn.ModuleList(LowRank(tower.width, recipe.rank, recipe.alpha, recipe.dropout) for _ in tower.blocks)
            for tower in (clip.text_tower, clip.vision_tower)
        )
        self.text_blocks = [LowRankBlock(*pair) for pair in zip(clip.text_blocks, self.text, strict=True)]
        self.vision_blocks = [LowRankBlock(*pair) for pair in zip(clip.vision_blocks, self.vision, strict=True)]
        self.to(clip.device)

    def encode_image(self, images: torch.Tensor, patches: bool = False) -> torch.Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> normalised features (B, E)."""
        tower = self.clip.vision_tower
        x = tower.embed(images, patches)
        for block in self.vision_blocks:
            x = block(x)
        return tower.features(x)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (S, L) of sentences -> normalised features (S, E)."""
        return F.normalize(sentence_features(self.clip, ids, self.text_blocks), dim=-1)

    def updates(self) -> list[nn.Parameter]:
        """All trainable parameters."""
        return [*self.text.parameters(), *self.vision.parameters()]

    @torch.no_grad()
    def merge(self) -> FrozenCLIP:
        """A copy of the CLIP with the updates merged into its weights."""
        clip = own_clip(self.clip)
        updates: Any = [*self.text, *self.vision]
        for block, update in zip([*clip.text_blocks, *clip.vision_blocks], updates, strict=True):
            block.attn.in_proj_weight.add_(update.merged())
        return clip


def train_updates(model: LoRA, task: Task) -> list[float]:
    """Train the low-rank updates on the task's images; returns the loss of every step."""
    loss = zero_shot_loss(task, model.encode_image, model.encode_text)
    model.train()
    losses = train_steps(task, model.updates(), loss, task.train_images, task.recipe.steps)
    model.eval()
    return losses


def fit(task: Task) -> ZeroShot:
    model = LoRA(task.clip, task.recipe)
    train_updates(model, task)
    return ZeroShot(task, clip=model.merge())
