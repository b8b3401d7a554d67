"""Small changes on top of a frozen CLIP, trained on its features: of those of the text by TaskRes and CLAP, of
those of the image by CLIP-Adapter.

Rows are twenty random crops of each image, or for the miniature both views, in as many batches as there are
of images; the authors' code draws new crops in every epoch. The last epoch is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import class_texts
from dcp_zoo.fields import option
from dcp_zoo.heads.config import Abilities
from dcp_zoo.heads.kinds import AdapterHead, LinearHead
from dcp_zoo.probe.estimates import class_means
from dcp_zoo.training.methods.base import CLOSED, Method, RowsRecipe, augmented, train_on_rows
from dcp_zoo.training.methods.prompts import CoOpRecipe
from dcp_zoo.training.task import Task

# ------------------------------------------------------------------------------------------------------------ TaskRes


@dataclass(frozen=True)
class TaskResRecipe(RowsRecipe, optimizer="adam", lr=2e-3, epochs=200):
    """That of the authors' scripts, but for Flowers, where `scale` is 1."""

    scale: float = option(0.5, "alpha, of the residuals")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "TaskResRecipe":
        return cls(epochs=100 if shots < 5 else 200, lr=2e-4 if dataset == "imagenet" else 2e-3)


def fit_taskres(task: Task) -> LinearHead:
    """TaskRes: a learned residual x of each class on its text features.

    With image features f (B, E), text features t (C, E) as the tower gives them, not normalised (the mean over
    the sentences of a class), residuals x (C, E), at first 0, and s = exp(logit_scale):

        w_c      = t_c + alpha x_c
        logits_c = s f w_c^T / |w_c|                                         (B,)
    """
    sentences, counts = class_texts(task.classnames, task.texts)
    text = task.clip.encode_sentences(task.classnames, task.texts)
    if counts is not None:
        raw = task.clip.encode_sentences(sentences, "{}")
        text = torch.stack([of_class.mean(0) for of_class in raw.split(counts)])
    residuals = torch.zeros_like(text, requires_grad=True)

    def moved() -> Tensor:
        return F.normalize(text + task.recipe.scale * residuals, dim=-1)

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(task.clip.logits(features, moved()), labels)

    train_on_rows(task, [residuals], loss)
    return task.text_head(moved().detach())


# ------------------------------------------------------------------------------------------------------- CLIP-Adapter


@dataclass(frozen=True)
class CLIPAdapterRecipe(RowsRecipe, lr=0.002, batch_size=32, epochs=200):
    """The ratio and width of the authors' code, and the schedule of CoOp, by whose commands it runs."""

    ratio: float = option(0.2, "share of the adapter's output in the image features", min=0, max=1)

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "CLIPAdapterRecipe":
        return cls(epochs=CoOpRecipe.for_task(model, dataset, shots, protocol).epochs)


def fit_clip_adapter(task: Task) -> AdapterHead:
    """CLIP-Adapter: a learned network on the image features, blended with these.

    The equations are those of `AdapterHead`; D and U are trained by cross-entropy. The authors' code gives the
    network features that are not normalised: the length of f scales both terms of f', and changes no logits.
    """
    head = AdapterHead(task.clip, task.classnames, *task.clip.scaled(task.text), texts=task.texts).to(task.clip.device)
    head.adapter.ratio.fill_(task.recipe.ratio)

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head.classify(features).float(), labels)

    train_on_rows(task, [*head.adapter.requires_grad_().parameters()], loss)
    return head


# ---------------------------------------------------------------------------------------------------------------- CLAP


@dataclass(frozen=True)
class CLAPRecipe(RowsRecipe, lr=0.1, weight_decay=0.0, epochs=300):
    """That of the authors' code: SGD with momentum 0.9, and a cosine after one epoch at 1e-5."""

    unit: bool = option(
        True, "start from normalised text features; false: from the text tower's raw output, as the authors' code"
    )


def fit_clap(task: Task) -> LinearHead:
    """CLAP: a linear probe initialised with the text features and penalised, class by class, for leaving them.

    With image features f (B, E), s = exp(logit_scale), text features t_c (E,), and prototypes w (C, E), at first
    t:

        logits_c = s f w_c^T / |w_c|                                             (B,)
        loss     = cross-entropy + mean over c of a_c |w_c - t_c|^2

    a_c is the mean zero-shot probability of class c over its own training images: the better zero-shot CLIP is,
    the stronger the penalty. t is normalised, as in the paper, unless `unit=False`.
    """
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


TASKRES = Method(
    "taskres",
    "TaskRes",
    "Yu et al., Task Residual for Tuning Vision-Language Models, CVPR 2023",
    fit_taskres,
    TaskResRecipe,
    CLOSED,
    features=augmented,
)
CLIP_ADAPTER = Method(
    "clip-adapter",
    "CLIP-Adapter",
    "Gao et al., CLIP-Adapter: Better Vision-Language Models with Feature Adapters, IJCV 2024",
    fit_clip_adapter,
    CLIPAdapterRecipe,
    Abilities(linear=False, fitted=True),
    features=augmented,
)
CLAP = Method(
    "clap",
    "CLAP",
    "Silva-Rodriguez et al., A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models, CVPR 2024",
    fit_clap,
    CLAPRecipe,
    CLOSED,
    features=augmented,
)
