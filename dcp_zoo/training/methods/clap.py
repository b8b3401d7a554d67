"""CLAP (Silva-Rodriguez et al., CVPR 2024): a linear probe initialised with the text features and penalised,
class by class, for leaving them.

With image features f (B, E), s = exp(logit_scale), text features t_c (E,), and prototypes w (C, E), at first
t:

    logits_c = s f w_c^T / |w_c|                                             (B,)
    loss     = cross-entropy + mean over c of a_c |w_c - t_c|^2

a_c is the mean zero-shot probability of class c over its own training images: the better zero-shot CLIP is,
the stronger the penalty. t is normalised, as in the paper, unless `unit=False`. Rows are twenty random crops
of each image, or for the miniature both views, in as many batches as there are of images. The last epoch is
used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.probe.estimates import class_means
from dcp_zoo.training.methods.base import CLOSED, Method, RowsRecipe, augmented, train_on_rows
from dcp_zoo.training.recipes import TrainingRecipe, changed, option
from dcp_zoo.training.task import Task


@dataclass(frozen=True)
class CLAPRecipe(RowsRecipe):
    """That of the authors' code: SGD with momentum 0.9, and a cosine after one epoch at 1e-5."""

    lr: float = changed(TrainingRecipe, "lr", 0.1)
    weight_decay: float = changed(TrainingRecipe, "weight_decay", 0.0)
    epochs: int | None = changed(TrainingRecipe, "epochs", 300)
    unit: bool = option(
        True, "start from normalised text features; false: from the text tower's raw output, as the authors' code"
    )


def fit(task: Task) -> LinearHead:
    recipe: CLAPRecipe = task.recipe
    clip = task.clip
    features = task.train.rows(*augmented(task))  # (V, n, E)
    rows = features.flatten(0, 1)  # (V n, E)
    labels = task.train.labels.repeat(len(features))
    start = clip.encode_sentences(task.classnames, task.texts)
    if recipe.unit:
        start = F.normalize(start, dim=-1)
    prototypes = start.clone()

    def classify(features: Tensor) -> Tensor:
        return clip.logits(features, F.normalize(prototypes, dim=-1))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        distance = (prototypes - start).square().sum(-1)  # (C,)
        return F.cross_entropy(classify(features), labels) + (strength * distance).mean()

    probabilities = torch.cat([classify(chunk.to(start)).softmax(-1).cpu() for chunk in rows.split(1000)])
    own = probabilities.gather(1, labels[:, None])  # (V n, 1) of each row's own class
    strength = class_means(own, labels, len(task.classnames))[:, 0].to(start)  # (C,), the a_c
    train_on_rows(task, [prototypes.requires_grad_()], loss)
    return task.text_head(F.normalize(prototypes.detach(), dim=-1))


PAPER = "Silva-Rodriguez et al., A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models, CVPR 2024"
CLAP = Method("clap", "CLAP", PAPER, fit, CLAPRecipe, CLOSED, features=augmented)
