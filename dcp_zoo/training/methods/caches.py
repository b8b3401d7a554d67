"""Training images kept in a cache whose values are added to zero-shot CLIP's logits: Tip-Adapter and
ProKeR."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.fields import option
from dcp_zoo.heads.kinds import CacheHead
from dcp_zoo.training.methods.base import (
    CACHED,
    CropsRecipe,
    Method,
    augmented,
    most_accurate,
    train_on_images,
)
from dcp_zoo.training.recipes import batch_sizes, count
from dcp_zoo.training.task import Task

STRENGTHS = 0.1, 50.0  # of Tip-Adapter's alpha and beta
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)  # of ProKeR
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# -------------------------------------------------------------------------------------------------------- Tip-Adapter


@dataclass(frozen=True)
class TipAdapterRecipe(CropsRecipe):
    alpha: float = option(1.0, "weight of the cache, without validation images and while keys are trained")
    beta: float = option(1.0, "sharpness of the cache's similarities; used like alpha")


@dataclass(frozen=True)
class TipAdapterFRecipe(TipAdapterRecipe):
    lr: float = option(1e-3, "learning rate of AdamW's first step, with a cosine over all steps")
    batch_size: int = count(256, "images per step")
    epochs: int = count(20, "passes over the training images")


def fit_tip_adapter(task: Task) -> CacheHead:
    """Tip-Adapter: adds the labels of similar training images to the zero-shot logits.

    The equations are those of `CacheHead`: the keys are the normalised mean features of the views of each
    training image, the values its one-hot label. alpha and beta are chosen on the few-shot validation
    images, if there are any, the smallest values on a tie. The authors' code uses a different search range
    for each dataset; here all share one grid.
    """
    return choose_strength(cache_head(task, task.recipe.alpha), task)


def fit_tip_adapter_f(task: Task) -> CacheHead:
    """Tip-Adapter-F also trains the keys, by cross-entropy; text features and labels stay fixed."""
    recipe: TipAdapterFRecipe = task.recipe
    head = cache_head(task, recipe.alpha)
    source = task.feature_loader()
    head.keys.requires_grad_()
    optimizer = torch.optim.AdamW([head.keys], recipe.lr, eps=1e-4)
    steps = recipe.epochs * len(batch_sizes(len(source), recipe.batch_size, drop_last=True))

    def loss(inputs: Inputs, labels: Tensor) -> Tensor:
        with torch.no_grad():
            features = task.clip.encode_image(inputs)
        return F.cross_entropy(head.classify(features).float(), labels)

    train_on_images(task, optimizer, loss, source, steps)
    return choose_strength(head, task)


def cache_head(task: Task, alpha: float) -> CacheHead:
    """The head before anything is chosen or trained, for a recipe with crops and beta."""
    text = task.text
    keys = F.normalize(task.train.rows(*augmented(task)).mean(0), dim=-1).to(text.device)
    head = CacheHead(task.clip, task.classnames, text, len(keys))
    head.keys = keys
    head.values = F.one_hot(task.train.labels, len(task.classnames)).to(keys)
    head.alpha.fill_(alpha)
    head.beta.fill_(task.recipe.beta)
    return head


@torch.no_grad()
def choose_strength(head: CacheHead, task: Task) -> CacheHead:
    """Choose alpha and beta on the validation images, if there are any; ties go to the smallest values."""
    recipe: TipAdapterRecipe = task.recipe
    strength = recipe.alpha, recipe.beta
    if task.val is not None:
        features = task.embeddings(task.val)
        zero_shot = task.clip.logits(features, head.weight)

        def candidates() -> Iterator[tuple[tuple[float, float], Tensor]]:
            betas = np.geomspace(*STRENGTHS, 40).tolist()
            for beta in task.progress(betas, "alpha and beta", len(betas)):
                cached = head.cached(features, beta)
                for alpha in np.geomspace(*STRENGTHS, 20).tolist():
                    yield (alpha, beta), zero_shot + alpha * cached

        strength = most_accurate(candidates(), task.val.labels)
    alpha, beta = strength
    head.alpha.fill_(alpha)
    head.beta.fill_(beta)
    head.info = {"alpha": round(alpha, 4), "beta": round(beta, 4)}
    return head


# ------------------------------------------------------------------------------------------------------------- ProKeR


@dataclass(frozen=True)
class ProKeRRecipe(CropsRecipe):
    beta: float = option(1.5, "sharpness of the kernel, without validation images; by default by the shots", min=0)
    penalty: float = option(0.05, "lambda, without validation images; by default by the shots", min=1e-4)

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "ProKeRRecipe":
        # what the authors' code chose on ImageNet, by the shots
        by_shots = {1: (3.0, 0.05), 2: (2.6, 0.05), 4: (1.5, 0.05), 8: (1.66, 0.07), 16: (1.7, 0.1)}
        nearest = max(known for known in by_shots if known <= shots)
        beta, penalty = by_shots[nearest]
        return cls(beta=beta, penalty=penalty)


@torch.no_grad()
def fit_proker(task: Task) -> CacheHead:
    """ProKeR: kernel ridge regression of the labels minus zero-shot CLIP's cosines.

    With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), n keys K (n, E)
    and one-hot labels L (n, C) as in `CacheHead`, and the kernel k(x, y) = exp(-beta (1 - x y^T)):

        A      = (k(K, K) / lambda + I)^-1 (L - K W^T)                       (n, C)
        logits = s (f W^T + k(f, K) A)                                       (B, C)

    This is the authors' code, in which lambda scales what the ridge regression adds, besides penalising it.
    beta and lambda are chosen on the few-shot validation images, the smallest on a tie; else they are the
    authors' for ImageNet. The authors' code searches other ranges for each dataset; here all share `BETAS`
    and `PENALTIES`.
    """
    recipe: ProKeRRecipe = task.recipe
    head = cache_head(task, task.clip.clip.logit_scale.exp().item())
    keys = head.keys.cpu().double()
    text = head.weight.cpu().double()
    cosines = keys @ keys.T
    residuals = head.values.cpu() - keys @ text.T

    def with_strength(beta: float, penalty: float) -> CacheHead:
        system = (-beta * (1 - cosines)).exp() / penalty + torch.eye(len(keys))
        head.values = torch.cholesky_solve(residuals, torch.linalg.cholesky(system)).to(head.values)
        head.beta.fill_(beta)
        return head

    strength = recipe.beta, recipe.penalty
    if task.val is not None:
        features = task.embeddings(task.val)
        pairs = list(product(BETAS, PENALTIES))
        shown = task.progress(pairs, "beta and lambda", len(pairs))
        candidates = ((pair, with_strength(*pair).classify(features)) for pair in shown)
        strength = most_accurate(candidates, task.val.labels)
    head.info = dict(zip(("beta", "lambda"), strength, strict=True))
    return with_strength(*strength)


PAPER = "Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, ECCV 2022"
TIP_ADAPTER = Method(
    "tip-adapter", "Tip-Adapter", PAPER, fit_tip_adapter, TipAdapterRecipe, CACHED, chooses=True, features=augmented
)
TIP_ADAPTER_F = replace(
    TIP_ADAPTER, name="tip-adapter-f", title="Tip-Adapter-F", fit=fit_tip_adapter_f, config=TipAdapterFRecipe
)

PAPER = "Bendou et al., ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models, CVPR 2025"
PROKER = Method("proker", "ProKeR", PAPER, fit_proker, ProKeRRecipe, CACHED, chooses=True, features=augmented)
