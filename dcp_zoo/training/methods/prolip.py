"""ProLIP (Fahes et al., arXiv:2410.05270): fine-tunes the last projection of the image tower, penalising its change.

With input x (B, Dv), projection P (Dv, E), pretrained P0, zero-shot classifier W (C, E), and s = exp(logit_scale):

    f      = x P / |x P|                                                     (B, E)
    logits = s f W^T                                                         (B, C)
    loss   = cross-entropy + lambda |P - P0|^2,  lambda = 1 / shots

in full batches. Each step draws new random crops; for the miniature, which only flips, x is cached for both views and
the steps alternate between them. No model selection: this is the authors' variant without validation images, at 1e-5,
the smallest of the learning rates that they report for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.backbone.towers.open_clip import OpenClipViT
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.loop import cosine
from dcp_zoo.training.methods.base import Method, Task, minimise, own_clip
from dcp_zoo.training.methods.clip_weights import zero_shot_of
from dcp_zoo.training.recipes import BaseRecipe, changed, count, option
from dcp_zoo.training.sources import encode_views


@dataclass(frozen=True)
class ProLIPRecipe(BaseRecipe):
    """That of the authors' code: Adam with a cosine over all steps."""

    augment: str = changed(BaseRecipe, "augment", "crop-flip")
    penalty: float = option(0.25, "lambda; by default 1 / shots")
    lr: float = option(1e-5, "learning rate of the first step")
    eps: float = option(1e-4, "epsilon of Adam")
    epochs: int = count(300, "steps, each on all training images")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "ProLIPRecipe":
        return cls(penalty=1 / shots)


def fit(task: Task) -> LinearHead:
    recipe: ProLIPRecipe = task.recipe
    tower, clip = task.clip.vision_tower, own_clip(task.clip)
    start = tower.visual.proj if isinstance(tower, OpenClipViT) and tower.token_only else None
    if start is None:
        problem = "ProLIP trains the projection of a class token of open_clip's ViT, but this CLIP has none"
        raise ZooError(f"{problem}: use clip-lora, tip-adapter-f or clap instead.")
    text, projection = task.text, clip.visual.proj.requires_grad_()

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        logits = clip.logits(F.normalize(x @ projection, dim=-1), text)
        return F.cross_entropy(logits, labels) + recipe.penalty * (projection - start).square().sum()

    optimizer = torch.optim.Adam([projection], recipe.lr, eps=recipe.eps)
    minimise(task, loss, optimizer, inputs(task), cosine(recipe.lr, recipe.epochs), recipe.epochs)
    projection.requires_grad_(False).grad = None
    return zero_shot_of(clip, task)


def inputs(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of views: the projection's inputs (n, Dv) for all training images, and their labels (n,)."""
    source, tower = task.train_images, task.clip.vision_tower

    def encode(inputs: Inputs) -> Tensor:
        return tower.norm(tower.run(tower.embed(inputs).x, ())[:, 0])

    def one_pass() -> Tensor:
        return encode_views(source, encode, source.num_views)

    if source.views is None and task.recipe.augment == "crop-flip":
        while True:
            yield one_pass()[0], source.labels
    for view in cycle(one_pass()):
        yield view, source.labels


PAPER = "Fahes et al., CLIP's Visual Embedding Projector is a Few-shot Cornucopia, arXiv:2410.05270"
PROLIP = Method("prolip", "ProLIP", PAPER, fit, ProLIPRecipe)
