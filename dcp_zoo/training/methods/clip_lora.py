"""CLIP-LoRA (Zanella and Ben Ayed, CVPR Workshops 2024): low-rank updates of both towers' attention weights, trained
through the dataset's prompt template.

In every block of both towers, the query, key and value projections W (D, D) of the normalised input x (.., D) each get
an update with A (r, D), B (D, r) and its own dropout:

    W x + gamma B A dropout(x),  gamma = alpha / sqrt(r)                     (.., D)

A is initialised like a linear layer's weight and B to 0. The loss is the cross-entropy of the zero-shot logits s f W^T,
with text features recomputed in every step. Afterwards gamma B A is merged into a copy of CLIP, which is then an
ordinary CLIP that accepts any class names. No model selection: the last step is used.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.towers.open_clip import OpenClipBlock
from dcp_zoo.fields import count, option
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.methods.base import Method, Task, own_clip
from dcp_zoo.training.methods.clip_weights import AdamWRecipe, both_blocks, check_blocks, train_weights, zero_shot_of


@dataclass(frozen=True)
class CLIPLoRARecipe(AdamWRecipe):
    rank: int = count(2, "r of the updates")
    alpha: float = option(1.0, "scale of the updates, which are multiplied by alpha / sqrt(r)")
    dropout: float = option(0.25, "dropout of the updates' inputs")


def fit(task: Task) -> LinearHead:
    clip = own_clip(task.clip)
    updates = add_updates(clip, task.recipe).train()
    train_weights(clip, task, updates.parameters(), task.recipe.steps)
    return zero_shot_of(merge(clip, updates), task)


def add_updates(clip: FrozenCLIP, recipe: CLIPLoRARecipe) -> nn.ModuleList:
    """Give the blocks of both towers of a CLIP fresh low-rank updates; returns these, text first."""
    check_blocks(clip, "CLIP-LoRA")
    updates = nn.ModuleList()
    towers: Any = clip.text_tower, clip.vision_tower
    for tower in towers:
        own = [LowRank(tower.width, recipe.rank, recipe.alpha, recipe.dropout).to(clip.device) for _ in tower.blocks]
        tower.blocks = [LowRankBlock(block.module, update) for block, update in zip(tower.blocks, own, strict=True)]
        updates.extend(own)
    return updates.eval()


@torch.no_grad()
def merge(clip: FrozenCLIP, updates: Iterable[Any]) -> FrozenCLIP:
    """The CLIP with the updates of its blocks merged into its weights."""
    for block, update in zip(both_blocks(clip), updates, strict=True):
        block.attn.in_proj_weight.add_(update.scale * (update.b @ update.a).flatten(0, 1))
    return clip.with_clip(clip.clip)


class LowRank(nn.Module):
    """Updates of the queries, keys and values of a block: x (.., D) -> (.., 3 D)."""

    def __init__(self, width: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = alpha / rank**0.5, dropout
        self.a = nn.Parameter(torch.empty(3, rank, width).uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.Parameter(torch.zeros(3, width, rank))

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Of queries, keys and values those in `rows`, by default all."""
        pairs = zip(self.a[rows], self.b[rows], strict=True)
        return self.scale * torch.cat([F.dropout(x, self.dropout, self.training) @ a.T @ b.T for a, b in pairs], -1)


class LowRankBlock(OpenClipBlock):
    """A block of CLIP with updates of its queries, keys and values."""

    def __init__(self, module: nn.Module, update: LowRank) -> None:
        super().__init__(module)
        self.update = update

    def project(self, normed: Tensor, parts: str) -> Tensor:
        return super().project(normed, parts) + self.update(normed, slice(1) if parts == "q" else slice(1, None))


PAPER = "Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPR Workshops 2024"
CLIP_LORA = Method("clip-lora", "CLIP-LoRA", PAPER, fit, CLIPLoRARecipe)
