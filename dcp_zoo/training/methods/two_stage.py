"""2SFS (Farina et al., Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages, CVPR 2025): first
trains the LayerNorms of both towers, then a classifier on top.

With image features f (B, E), text features W (C, E) of the dataset's template, and s = exp(logit_scale):

    stage 1:  s f W^T            trains weights and biases of all LayerNorms, in a copy of CLIP
    stage 2:  s f w_c^T / |w_c|  trains w (C, E), initialised to stage 1's W; both towers are frozen

both with cross-entropy, each with a new optimizer and cosine. Stage 1 takes 60 % of 300 steps per shot, stage 2 the
rest. For the miniature, which only flips, stage 2 caches the features of both views. No model selection: the last step
is used.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import check_classnames
from dcp_zoo.training.methods.base import CosineClassifier, Task
from dcp_zoo.training.methods.tuning import as_features, own_clip, sentence_features, train_steps, zero_shot_loss
from dcp_zoo.training.sources import encode_views


class TwoStage(CosineClassifier):
    """See the module. `clip` is a copy, and `weight` (C, E) the classifier."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, own_clip(task.clip))
        self.names, self.weight = check_classnames(task.classnames), torch.empty(0)

    @property
    def text(self) -> torch.Tensor:  # type: ignore[override]
        return F.normalize(self.weight, dim=-1)

    def train_norms(self, task: Task) -> list[float]:
        """Stage 1; returns the loss of every step."""

        def encode_text(ids: torch.Tensor) -> torch.Tensor:
            return F.normalize(sentence_features(self.clip, ids), dim=-1)

        loss = zero_shot_loss(task, self.clip.encode_image, encode_text)
        losses = train_steps(task, norm_parameters(self.clip), loss, task.train_images, task.recipe.stages[0])
        self.clip.requires_grad_(False).zero_grad(set_to_none=True)
        return losses

    def train_classifier(self, task: Task) -> list[float]:
        """Stage 2; returns the loss of every step."""
        source = task.train_images
        self.weight = self.clip.zero_shot_classifier(self.names, task.template).requires_grad_()
        if source.views is not None or task.recipe.augment != "crop-flip":
            source = replace(source, views=encode_views(source, self.clip.encode_image, source.flips))

        def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.classify(as_features(self.clip, inputs, source.patches)).float(), labels)

        losses = train_steps(task, [self.weight], loss, source, task.recipe.stages[1])
        self.weight.requires_grad_(False)
        return losses


def norm_parameters(clip: FrozenCLIP) -> list[nn.Parameter]:
    """Make the weights and biases of all LayerNorms of both towers trainable, and return them."""
    norms = [module.requires_grad_() for module in clip.clip.modules() if isinstance(module, nn.LayerNorm)]
    return [p for norm in norms for p in norm.parameters()]


def fit(task: Task) -> TwoStage:
    model = TwoStage(task)
    model.train_norms(task)
    model.train_classifier(task)
    return model
