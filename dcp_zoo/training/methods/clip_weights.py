"""Methods that train a small part of CLIP's own weights, in a copy of it: CLIP-LoRA, CLIP-SVD, 2SFS and
ProLIP."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from dcp_zoo.backbone.classes import class_texts, mean_of_texts
from dcp_zoo.backbone.clip import FrozenCLIP, Reading
from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.backbone.tokens import end_positions
from dcp_zoo.backbone.towers.open_clip import OpenClipBlock, OpenClipViT
from dcp_zoo.backbone.towers.text import shares_prefix
from dcp_zoo.errors import ZooError
from dcp_zoo.features import ImageLoader, crop_views
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.loop import Loss, cosine
from dcp_zoo.training.methods.base import CLOSED, Method, minimise, own_clip, train_on_images
from dcp_zoo.training.recipes import BaseRecipe, count, option
from dcp_zoo.training.task import Task

FINAL_LR = 1e-6  # of CLIP-LoRA, CLIP-SVD and 2SFS


@dataclass(frozen=True)
class AdamWRecipe(BaseRecipe, augment="crop-flip"):
    """AdamW with a cosine down to `FINAL_LR`, as in the authors' code of CLIP-LoRA, CLIP-SVD and 2SFS."""

    lr: float = option(2e-4, "learning rate of the first step, in each stage if there are several")
    weight_decay: float = option(1e-2, "decoupled weight decay")
    batch_size: int = count(32, "images per step")
    steps: int = count(2000, "training steps, of all stages; this many for 4 images per class, in proportion to them")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "AdamWRecipe":
        return cls(steps=cls.steps * shots // 4)


def check_blocks(clip: FrozenCLIP, method: str) -> None:
    """Raise ZooError unless both towers are open_clip's own, the text tower a causal one."""
    if not (isinstance(clip.vision_tower, OpenClipViT) and shares_prefix(clip.text)):
        lacking = "blocks of open_clip's own ViT and causal text tower, which this CLIP does not have"
        raise ZooError(f"{method} updates the {lacking}: use 2sfs, tip-adapter-f or clap instead.")


def sentence_features(clip: FrozenCLIP, ids: Tensor) -> Tensor:
    """ids (S, L) -> text features (S, E), not normalised; gradients reach all weights that require them."""
    if not shares_prefix(clip.text):
        return clip.clip.encode_text(ids, normalize=False)
    text = clip.text
    y = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
    for block in clip.text_tower.blocks:
        y = block(y, causal=True)
    return clip.text_tower.project(y[torch.arange(len(y), device=y.device), end_positions(text, ids)])


def train_steps(task: Task, trained: Iterable[Tensor], loss: Loss, source: ImageLoader, steps: int) -> None:
    """AdamW with a cosine from the recipe's learning rate to `FINAL_LR`."""
    optimizer = torch.optim.AdamW(trained, task.recipe.lr, weight_decay=task.recipe.weight_decay)
    train_on_images(task, optimizer, loss, source, steps, FINAL_LR)


def train_weights(clip: FrozenCLIP, task: Task, trained: Iterable[Tensor], steps: int) -> None:
    """Train these weights of a CLIP by zero-shot classification, encoding images and sentences in every
    step."""
    sentences, counts = class_texts(task.classnames, task.texts)
    ids = task.clip.tokenize(sentences)  # (S, L)
    if shares_prefix(task.clip.text):  # in a causal tower tokens after an end token have no effect
        ids = ids[:, : int(end_positions(task.clip.text, ids).max()) + 1]

    def loss(inputs: Inputs, labels: Tensor) -> Tensor:
        text = mean_of_texts(F.normalize(sentence_features(clip, ids), dim=-1), counts)
        logits = task.clip.logits(clip.encode_image(inputs), text)
        return F.cross_entropy(logits.float(), labels)

    train_steps(task, trained, loss, task.images, steps)
    clip.requires_grad_(False).zero_grad(set_to_none=True)


def zero_shot_of(clip: FrozenCLIP, task: Task) -> LinearHead:
    """Zero-shot classification by a copy of CLIP that was trained."""
    text = clip.zero_shot_classifier(task.classnames, task.texts)
    return task.text_head(text, clip=clip, texts=task.texts)


# ------------------------------------------------------------------------------------------------------------ CLIP-LoRA


@dataclass(frozen=True)
class CLIPLoRARecipe(AdamWRecipe):
    rank: int = count(2, "r of the updates")
    alpha: float = option(1.0, "scale of the updates, which are multiplied by alpha / sqrt(r)")
    dropout: float = option(0.25, "dropout of the updates' inputs")


def fit_lora(task: Task) -> LinearHead:
    """CLIP-LoRA: low-rank updates of both towers' attention weights, trained through the dataset's prompt
    template.

    In every block of both towers, the query, key and value projections W (D, D) of the normalised input x
    (.., D) each get an update with A (r, D), B (D, r) and its own dropout:

        W x + gamma B A dropout(x),  gamma = alpha / sqrt(r)                 (.., D)

    A is initialised like a linear layer's weight and B to 0. The loss is the cross-entropy of the zero-shot
    logits s f W^T, with text features recomputed in every step. Afterwards gamma B A is merged into a copy
    of CLIP, which is then an ordinary CLIP that accepts any class names. No model selection: the last step
    is used.
    """
    clip = own_clip(task.clip)
    check_blocks(clip, "CLIP-LoRA")
    updated: list[LowRankBlock] = []
    towers: list[Any] = [clip.text_tower, clip.vision_tower]
    for tower in towers:
        tower.blocks = [LowRankBlock(block.module, tower.width, task) for block in tower.blocks]
        updated += tower.blocks
    trained = [block.a for block in updated] + [block.b for block in updated]
    train_weights(clip, task, trained, task.recipe.steps)
    with torch.no_grad():
        for block in updated:
            block.module.attn.in_proj_weight.add_(block.scale * (block.b @ block.a).flatten(0, 1))
    return zero_shot_of(clip.with_clip(clip.clip), task)


class LowRankBlock(OpenClipBlock):
    """A block of CLIP of this width D with updates A (3, r, D) and B (3, D, r) of its queries, keys and values,
    in training."""

    def __init__(self, module: nn.Module, width: int, task: Task) -> None:
        super().__init__(module)
        recipe: CLIPLoRARecipe = task.recipe
        bound = width**-0.5
        self.scale = recipe.alpha / recipe.rank**0.5
        self.dropout = recipe.dropout
        self.a = torch.empty(3, recipe.rank, width).uniform_(-bound, bound).to(task.clip.device).requires_grad_()
        self.b = torch.zeros(3, width, recipe.rank, device=task.clip.device, requires_grad=True)

    def project(self, normed: Tensor, parts: str) -> Tensor:
        projected = super().project(normed, parts)
        rows = slice(1) if parts == "q" else slice(1, None)
        updates = [F.dropout(normed, self.dropout) @ a.T @ b.T for a, b in zip(self.a[rows], self.b[rows], strict=True)]
        return projected + self.scale * torch.cat(updates, -1)


# ------------------------------------------------------------------------------------------------------------- CLIP-SVD


@dataclass(frozen=True)
class CLIPSVDRecipe(AdamWRecipe, lr=5e-4, steps=800):
    """That of the authors' code: one setting for all datasets."""


def fit_svd(task: Task) -> LinearHead:
    """CLIP-SVD: trains only the singular values of the weights in both towers, through the dataset's prompt
    template.

    In every block of both towers, each of the weights W of queries, keys, values, attention's output and MLP
    layers is

        W = U diag(values) V^T

    with the U, V and values, at first, of its singular value decomposition. The loss is that of CLIP-LoRA.
    No model selection: the last step is used.
    """
    clip = own_clip(task.clip)
    check_blocks(clip, "CLIP-SVD")
    blocks = [block.module for block in [*clip.text_tower.blocks, *clip.vision_tower.blocks]]
    layers = [module for module in nn.ModuleList(blocks).modules() if isinstance(module, nn.Linear)]
    weights = [(block.attn, "in_proj_weight", 3) for block in blocks]
    weights += [(layer, "weight", 1) for layer in layers]
    for module, name, parts in weights:
        parametrize.register_parametrization(module, name, SingularValues(getattr(module, name), parts))
    train_weights(clip, task, [p for p in clip.parameters() if p.requires_grad], task.recipe.steps)
    for module, name, _ in weights:
        parametrize.remove_parametrizations(module, name)
    return zero_shot_of(clip, task)


class SingularValues(nn.Module):
    """Parametrises a weight W by the singular values of its `parts`, equal blocks of rows (D, D'): U
    diag(values) V^T. Their change is added to W itself, so that before training W is exactly as it was."""

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        self.u, self.start, self.vh = torch.linalg.svd(weight.detach().unflatten(0, (parts, -1)), full_matrices=False)
        self.values = nn.Parameter(self.start.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ((self.u * (self.values - self.start)[:, None]) @ self.vh).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------- 2SFS


@dataclass(frozen=True)
class TwoSFSRecipe(AdamWRecipe, steps=1200):
    first_stage: float = option(0.6, "fraction of the steps in the first stage", min=0, max=1)


def fit_two_sfs(task: Task) -> LinearHead:
    """2SFS: first trains the LayerNorms of both towers, then a classifier on top.

    With image features f (B, E), text features W (C, E) of the dataset's template, and s = exp(logit_scale):

        stage 1:  s f W^T            trains weights and biases of all LayerNorms, in a copy of CLIP
        stage 2:  s f w_c^T / |w_c|  trains w (C, E), initialised to stage 1's W; both towers are frozen

    both with cross-entropy, each with a new optimizer and cosine. Stage 1 takes 60 % of 300 steps per shot,
    stage 2 the rest. For the miniature, which only flips, stage 2 caches the features of both views. The
    last step is used.
    """
    recipe: TwoSFSRecipe = task.recipe
    clip = own_clip(task.clip)
    norms = nn.ModuleList(module for module in clip.clip.modules() if isinstance(module, nn.LayerNorm))
    first = int(recipe.steps * recipe.first_stage)
    train_weights(clip, task, norms.requires_grad_().parameters(), first)
    weight = clip.zero_shot_classifier(task.classnames, task.texts).requires_grad_()

    def loss(inputs: Inputs, labels: Tensor) -> Tensor:
        with torch.no_grad():
            features = clip.encode_image(inputs)
        return F.cross_entropy(clip.logits(features, F.normalize(weight, dim=-1)).float(), labels)

    train_steps(task, [weight], loss, task.feature_loader(clip), recipe.steps - first)
    return task.text_head(F.normalize(weight.requires_grad_(False), dim=-1), clip=clip)


# --------------------------------------------------------------------------------------------------------------- ProLIP


@dataclass(frozen=True)
class ProLIPRecipe(BaseRecipe, augment="crop-flip"):
    """That of the authors' code: Adam with a cosine over all steps."""

    penalty: float = option(0.25, "lambda; by default 1 / shots")
    lr: float = option(1e-5, "learning rate of the first step")
    epochs: int = count(300, "steps, each on all training images")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "ProLIPRecipe":
        return cls(penalty=1 / shots)


def fit_prolip(task: Task) -> LinearHead:
    """ProLIP: fine-tunes the last projection of the image tower, penalising its change.

    With input x (B, Dv), projection P (Dv, E), pretrained P0, zero-shot classifier W (C, E), and s =
    exp(logit_scale):

        f      = x P / |x P|                                                 (B, E)
        logits = s f W^T                                                     (B, C)
        loss   = cross-entropy + lambda |P - P0|^2,  lambda = 1 / shots

    in full batches. Each step draws new random crops; for the miniature, which only flips, x is cached for
    both views and the steps alternate between them. No model selection: this is the authors' variant without
    validation images, at 1e-5, the smallest of the learning rates that they report for it.
    """
    recipe: ProLIPRecipe = task.recipe
    tower = task.clip.vision_tower
    start = tower.visual.proj if isinstance(tower, OpenClipViT) and tower.token_only else None
    if start is None:
        problem = "ProLIP trains the projection of a class token of open_clip's ViT, but this CLIP has none"
        raise ZooError(f"{problem}: use clip-lora, tip-adapter-f or clap instead.")
    clip = own_clip(task.clip)
    projection = clip.visual.proj.requires_grad_()
    text = task.text

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        logits = clip.logits(F.normalize(x @ projection, dim=-1), text)
        return F.cross_entropy(logits, labels) + recipe.penalty * (projection - start).square().sum()

    optimizer = torch.optim.Adam([projection], recipe.lr, eps=1e-4)
    minimise(task, loss, optimizer, projected(task), cosine(recipe.lr, recipe.epochs), recipe.epochs)
    projection.requires_grad_(False).grad = None
    return zero_shot_of(clip, task)


def projected(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of views: the projection's inputs (n, Dv) for all training images, and their labels
    (n,)."""
    source = task.images
    tower = task.clip.vision_tower

    def encode(images: Any) -> Tensor:
        return tower.norm(tower.run(task.clip.enter(images).x, ())[:, 0])

    inputs = Reading(task.clip, {"input of the projection": tower.width}, encode)
    if source.crops:
        for view in crop_views(task.recipe.epochs, task.seed):
            yield source.table([inputs], [view]).views[view], source.labels
    for rows in cycle(source.table([inputs], source.training_views).rows(*source.training_views)):
        yield rows, source.labels


CLIP_LORA = Method(
    "clip-lora",
    "CLIP-LoRA",
    "Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPR Workshops 2024",
    fit_lora,
    CLIPLoRARecipe,
)
CLIP_SVD = Method(
    "clip-svd",
    "CLIP-SVD",
    "Koleilat et al., Singular Value Few-shot Adaptation of Vision-Language Models, arXiv:2509.03740",
    fit_svd,
    CLIPSVDRecipe,
)
TWO_SFS = Method(
    "2sfs",
    "2SFS",
    "Farina et al., Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages, CVPR 2025",
    fit_two_sfs,
    TwoSFSRecipe,
    CLOSED,
)
PROLIP = Method(
    "prolip",
    "ProLIP",
    "Fahes et al., CLIP's Visual Embedding Projector is a Few-shot Cornucopia, arXiv:2410.05270",
    fit_prolip,
    ProLIPRecipe,
)
