"""MaPLe (Khattak et al., Multi-modal Prompt Learning, CVPR 2023): vision prompts are mapped from text prompts."""

import torch
from torch import nn

from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.prompts import PromptedCLIP, init_prompts


class MaPLe(PromptedCLIP):
    """Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each of the first blocks.
    Vision: the same at the end of the sequence, the prompts of block i being a linear map F_i of the text tower's."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        text, vision, recipe = self.clip.text_tower, self.clip.vision_tower, task.recipe
        depth = min(recipe.depth, len(text.blocks), len(vision.blocks))
        self.prompts = init_prompts(depth, recipe.n_ctx, text.width, task.clip.device)
        self.couplings = nn.ModuleList(nn.Linear(text.width, vision.width) for _ in range(depth)).to(task.clip.device)
        self.start_from(recipe.ctx_init)
        self.set_classnames(task.classnames)

    def image_prompts(self) -> list[torch.Tensor]:
        return [coupling(p) for coupling, p in zip(self.couplings, self.prompts, strict=True)]


def fit(task: Task) -> PromptedCLIP:
    return MaPLe(task).fit(task)
