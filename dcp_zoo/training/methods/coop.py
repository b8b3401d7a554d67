"""CoOp (Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022): learned context before the name."""

import torch

from dcp_zoo.training.methods.base import Task, feature_view, frozen_features
from dcp_zoo.training.methods.prompts import PromptedCLIP, init_prompts
from dcp_zoo.training.sources import ImageSource


class CoOp(PromptedCLIP):
    """Text: `[SOS] p_1 .. p_M name . [EOT]`, the same learned p for every class. Images: plain CLIP."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.prompts = init_prompts(1, task.recipe.n_ctx, self.clip.text_tower.width, task.clip.device)
        self.set_classnames(task.classnames)

    @torch.no_grad()
    def logits(self, source: ImageSource) -> torch.Tensor:
        features = frozen_features(self.clip, source, self.progress)[0]
        return self(features.to(self.clip.device)).cpu()


def fit(task: Task) -> PromptedCLIP:
    return CoOp(task).fit(task, feature_view(task))
