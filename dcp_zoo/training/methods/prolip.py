"""ProLIP (Fahes et al., CLIP's Visual Embedding Projector is a Few-shot Cornucopia, 2024): fine-tunes only the
last projection of the image tower, with a penalty on its change.

With the projection's input x (B, Dv), the projection P (Dv, E), its pretrained value P0, the zero-shot classifier W
(C, E), and s = exp(logit_scale):

    f      = x P / |x P|                                                 (B, E)
    logits = s f W^T                                                     (B, C)
    loss   = cross-entropy + lambda |P - P0|^2,  lambda = 1 / shots

in full batches. Each step draws new random crops; for the miniature, which only flips, x is cached for both views and
the steps alternate between them. No model selection: this is the authors' variant without validation images, at 1e-5,
the smallest of the learning rates that they report for it.
"""

from collections.abc import Iterator
from itertools import cycle

import torch
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.towers.vision import OpenClipViT
from dcp_zoo.training.loop import cosine, descend
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.tuning import own_clip
from dcp_zoo.training.methods.zero_shot import ZeroShot
from dcp_zoo.training.sources import ImageSource, encode_views
from dcp_zoo.training.state import TrainingState


def train_projection(clip: FrozenCLIP, task: Task) -> list[float]:
    """Train the projection of `clip`, a copy of the task's CLIP; returns the loss of every step."""
    recipe, tower = task.recipe, task.clip.vision_tower
    start = tower.visual.proj if isinstance(tower, OpenClipViT) and tower.token_only else None
    if start is None:
        raise ZooError(
            "ProLIP trains the projection of a class token of open_clip's ViT, but this CLIP has none: use clip-lora, "
            "tip-adapter-f or clap instead."
        )
    text, projection = task.text, clip.visual.proj.requires_grad_()

    def loss(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = clip.logits(F.normalize(x @ projection, dim=-1), text)
        return F.cross_entropy(logits, labels) + recipe.penalty * (projection - start).square().sum()

    optimizer = torch.optim.Adam([projection], recipe.lr, eps=recipe.eps)
    state, schedule = TrainingState().begin(optimizer, task.precision), cosine(recipe.lr, recipe.epochs)
    losses = descend(state, loss, inputs(task), schedule, recipe.epochs, task.progress)
    projection.requires_grad_(False).grad = None
    return losses


def inputs(task: Task) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless stream of views: the projection's inputs (n, Dv) for all training images, and their labels (n,)."""
    source = task.train_images
    if source.views is None and task.recipe.augment == "crop-flip":
        while True:
            yield unprojected(task.clip, source)[0], source.labels
    for view in cycle(unprojected(task.clip, source)):
        yield view, source.labels


def unprojected(clip: FrozenCLIP, source: ImageSource) -> torch.Tensor:
    """One pass over a source, in order -> inputs (V, n, Dv) of the image tower's projection, on the CPU."""
    tower = clip.vision_tower

    def encode(images: torch.Tensor, patches: bool) -> torch.Tensor:
        return tower.norm(tower.run(tower.embed(images, patches), ())[:, 0])

    return encode_views(source, encode, source.flips)


def fit(task: Task) -> ZeroShot:
    clip = own_clip(task.clip)
    train_projection(clip, task)
    return ZeroShot(task, clip=clip)
