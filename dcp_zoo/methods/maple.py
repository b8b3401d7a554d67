"""MaPLe (Khattak et al., Multi-modal Prompt Learning, CVPR 2023): vision prompts are mapped from text prompts."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from dcp_zoo.methods.base import Task, budget_overrides
from dcp_zoo.methods.prompts import PhrasePrompts, PromptedCLIP, init_prompts
from dcp_zoo.training.loop import seed_everything
from dcp_zoo.training.recipes import TrainingRecipe


@dataclass(frozen=True)
class MaPLeRecipe(TrainingRecipe):
    """SGD with learning rate 0.0035, batches of 4.

    Attributes:
        n_ctx: prompt tokens in a block of each tower.
        depth: blocks of each tower with their own prompts; at most the number of blocks of the shorter tower.
        ctx_init: words before the class name; the first `n_ctx` initialise the first prompts, the others stay words.
    """

    n_ctx: int = 2
    depth: int = 9
    ctx_init: str = "a photo of a"


class MaPLe(PhrasePrompts):
    """Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each of the first blocks.
    Vision: the same at the end of the sequence, the prompts of block i being a linear map F_i of the text tower's."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        text, vision, recipe = self.plain.text_tower, self.plain.vision_tower, task.recipe
        depth = min(recipe.depth, len(text.blocks), len(vision.blocks))
        self.prompts = init_prompts(depth, recipe.n_ctx, text.width, task.clip.device)
        self.couplings = nn.ModuleList(nn.Linear(text.width, vision.width) for _ in range(depth)).to(task.clip.device)
        self.rest = self.start_from(recipe.ctx_init)
        self.set_classnames(task.classnames)

    def image_prompts(self) -> list[torch.Tensor]:
        return [coupling(p) for coupling, p in zip(self.couplings, self.prompts, strict=True)]


def recipe(model: str, dataset: str, shots: int, protocol: str) -> MaPLeRecipe:
    """The paper's: 5 epochs for base-to-new, and a smaller budget where an ImageNet head must transfer. It has no
    few-shot protocol; there, DCP's 20 epochs."""
    published = MaPLeRecipe(epochs=20 if protocol == "few-shot" else 5)
    if protocol in ("cross-dataset", "domain-shift"):
        published = replace(published, lr=0.0026, epochs=2, depth=3)
    return published.updated(budget_overrides(model, dataset))


def fit(task: Task) -> PromptedCLIP:
    seed_everything(task.seed)
    return MaPLe(task).fit(task)
