"""VPT-deep (Jia et al., Visual Prompt Tuning, ECCV 2022) for CLIP, in the setting of MaPLe's comparison: learned
prompts in the vision tower, and a fixed template in the text tower."""

from collections.abc import Sequence

import torch

from dcp_zoo.model.names import Texts, check_classnames
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.prompts import PromptedCLIP, init_prompts


class VPT(PromptedCLIP):
    """Images: prompts at the end of the sequence, with new ones for every block. Text: as in zero-shot CLIP."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        tower = self.clip.vision_tower
        depth = min(task.recipe.depth, len(tower.blocks))
        self.prompts = init_prompts(depth, task.recipe.n_ctx, tower.width, task.clip.device)
        self.set_classnames(task.classnames)

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.template = template or self.template
        self.names = check_classnames(classnames)
        self.text_features = self.clip.zero_shot_classifier(self.names, self.template)

    def encode_text(self) -> torch.Tensor:
        return self.text_features

    def image_prompts(self) -> list[torch.Tensor]:
        return list(self.prompts)


def fit(task: Task) -> PromptedCLIP:
    return VPT(task).fit(task)
