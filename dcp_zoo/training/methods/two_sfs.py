"""2SFS (Farina et al., CVPR 2025): first trains the LayerNorms of both towers, then a classifier on top.

With image features f (B, E), text features W (C, E) of the dataset's template, and s = exp(logit_scale):

    stage 1:  s f W^T            trains weights and biases of all LayerNorms, in a copy of CLIP
    stage 2:  s f w_c^T / |w_c|  trains w (C, E), initialised to stage 1's W; both towers are frozen

both with cross-entropy, each with a new optimizer and cosine. Stage 1 takes 60 % of 300 steps per shot, stage 2 the
rest. For the miniature, which only flips, stage 2 caches the features of both views. The last step is used.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.classes import check_classnames
from dcp_zoo.backbone.clip import Reading
from dcp_zoo.backbone.inputs import Features, Inputs
from dcp_zoo.fields import changed, option
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.methods.base import CLOSED, Method, Task, own_clip
from dcp_zoo.training.methods.clip_weights import AdamWRecipe, train_steps, train_weights


@dataclass(frozen=True)
class TwoSFSRecipe(AdamWRecipe):
    steps: int = changed(AdamWRecipe, "steps", 1200)
    first_stage: float = option(0.6, "fraction of the steps in the first stage", min=0, max=1)


def fit(task: Task) -> LinearHead:
    recipe: TwoSFSRecipe = task.recipe
    clip, source = own_clip(task.clip), task.train_images
    norms = [module.requires_grad_() for module in clip.clip.modules() if isinstance(module, nn.LayerNorm)]
    first = int(recipe.steps * recipe.first_stage)
    train_weights(clip, task, [p for norm in norms for p in norm.parameters()], first)
    weight = clip.zero_shot_classifier(check_classnames(task.classnames), task.texts).requires_grad_()
    if source.views is not None or recipe.augment != "crop-flip":
        trained = Reading(clip, clip.widths[:1], clip.encode_image)
        source = replace(source, views=source.read_by(trained), form=Features)

    def loss(inputs: Inputs, labels: Tensor) -> Tensor:
        with torch.no_grad():
            features = clip.encode_image(inputs)
        return F.cross_entropy(clip.logits(features, F.normalize(weight, dim=-1)).float(), labels)

    train_steps(task, [weight], loss, source, recipe.steps - first)
    return task.text_head(F.normalize(weight.requires_grad_(False), dim=-1), clip=clip)


PAPER = "Farina et al., Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages, CVPR 2025"
TWO_SFS = Method("2sfs", "2SFS", PAPER, fit, TwoSFSRecipe, CLOSED)
