"""Methods that train a small part of CLIP's own weights, in a copy of it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.linear_head import LinearHead
from dcp_zoo.model.names import check_classnames
from dcp_zoo.model.towers.blocks import OpenClipBlock
from dcp_zoo.model.towers.text import shares_prefix
from dcp_zoo.model.towers.vision import OpenClipViT
from dcp_zoo.training.loop import cosine, descend
from dcp_zoo.training.methods import base
from dcp_zoo.training.methods.base import Task, own_clip
from dcp_zoo.training.methods.published import CLIPLoRARecipe
from dcp_zoo.training.sources import ImageSource, encode_views
from dcp_zoo.training.state import TrainingState


class LowRank(nn.Module):
    """Updates of the queries, keys and values of a block: x (.., D) -> (.., 3 D)."""

    def __init__(self, width: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = alpha / rank**0.5, dropout
        self.a = nn.Parameter(torch.empty(3, rank, width).uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.Parameter(torch.zeros(3, width, rank))

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Of queries, keys and values those in `rows`, by default all."""
        pairs = zip(self.a[rows], self.b[rows], strict=True)
        return self.scale * torch.cat([F.dropout(x, self.dropout, self.training) @ a.T @ b.T for a, b in pairs], -1)

    def merged(self) -> Tensor:
        """The same without dropout, as a matrix (3 D, D) to add to the block's `in_proj_weight`."""
        return self.scale * (self.b @ self.a).flatten(0, 1)


class LowRankBlock(OpenClipBlock):
    """A block of CLIP with updates of its queries, keys and values."""

    def __init__(self, module: nn.Module, update: Any) -> None:
        super().__init__(module)
        self.update = update

    def project(self, normed: Tensor, parts: str) -> Tensor:
        return super().project(normed, parts) + self.update(normed, slice(1) if parts == "q" else slice(1, None))


def check_blocks(clip: FrozenCLIP, method: str) -> None:
    """Raise ZooError unless both towers are open_clip's own, the text tower a causal one."""
    if not (isinstance(clip.vision_tower, OpenClipViT) and shares_prefix(clip.text)):
        raise ZooError(
            f"{method} updates the blocks of open_clip's own ViT and causal text tower, which this CLIP does not have: "
            "use 2sfs, tip-adapter-f or clap instead."
        )


def train_weights(clip: FrozenCLIP, task: Task, trained: Iterable[Tensor], steps: int) -> list[float]:
    """Train these weights of a copy of CLIP by zero-shot classification; returns the loss of every step."""
    losses = base.train_steps(task, trained, base.zero_shot_loss(task, clip), task.train_images, steps)
    clip.requires_grad_(False).zero_grad(set_to_none=True)
    return losses


def add_updates(clip: FrozenCLIP, recipe: CLIPLoRARecipe) -> nn.ModuleList:
    """Give the blocks of both towers of a CLIP fresh low-rank updates; returns these, text first."""
    check_blocks(clip, "CLIP-LoRA")
    updates = nn.ModuleList()
    towers: Any = clip.text_tower, clip.vision_tower
    for tower in towers:
        own = [LowRank(tower.width, recipe.rank, recipe.alpha, recipe.dropout).to(clip.device) for _ in tower.blocks]
        tower.blocks = [LowRankBlock(block.module, update) for block, update in zip(tower.blocks, own, strict=True)]
        updates.extend(own)
    return updates.eval()


@torch.no_grad()
def merge(clip: FrozenCLIP, updates: Iterable[Any]) -> FrozenCLIP:
    """The CLIP with the updates of its blocks merged into its weights."""
    for block, update in zip([*clip.text_blocks, *clip.vision_blocks], updates, strict=True):
        block.attn.in_proj_weight.add_(update.merged())
    return FrozenCLIP(clip.clip, clip.tokenizer, clip.pretrained_cfg)


def train_updates(clip: FrozenCLIP, updates: nn.ModuleList, task: Task) -> list[float]:
    """CLIP-LoRA: low-rank updates of the attention weights in both towers, trained through the dataset's prompt
    template.

    In every block of both towers, the query, key and value projections W (D, D) of the normalised input x (.., D) each
    get an update with A (r, D), B (D, r) and its own dropout:

        W x + gamma B A dropout(x),  gamma = alpha / sqrt(r)                 (.., D)

    A is initialised like a linear layer's weight and B to 0. The loss is the cross-entropy of the zero-shot logits s f
    W^T, with text features recomputed in every step. Afterwards gamma B A is merged into a copy of CLIP, which is then
    an ordinary CLIP that accepts any class names. No model selection: the last step is used. Returns the loss of every
    step.
    """
    updates.train()
    losses = train_weights(clip, task, updates.parameters(), task.recipe.steps)
    updates.eval()
    return losses


def fit_lora(task: Task) -> LinearHead:
    clip = own_clip(task.clip)
    updates = add_updates(clip, task.recipe)
    train_updates(clip, updates, task)
    return zero_shot_of(merge(clip, updates), task)


def zero_shot_of(clip: FrozenCLIP, task: Task) -> LinearHead:
    """Zero-shot classification by a copy of CLIP that was trained."""
    text = clip.zero_shot_classifier(check_classnames(task.classnames), task.template)
    return task.text_head(text, clip=clip, texts=task.template)


class SingularValues(nn.Module):
    """Parametrises a weight W by the singular values of its `parts`, equal blocks of rows (D, D'): U diag(values) V^T.
    What is trained is added to W as it is, so that nothing changes before."""

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(weight.detach().unflatten(0, (parts, -1)), full_matrices=False)
        self.u, self.start, self.vh, self.values = u, s, vh, nn.Parameter(s.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ((self.u * (self.values - self.start)[:, None]) @ self.vh).flatten(0, 1)


def train_singular_values(clip: FrozenCLIP, task: Task) -> list[float]:
    """CLIP-SVD: trains only the singular values of the weights in both towers, through the dataset's prompt template.

    In every block of both towers, each of the weights W of queries, keys, values, the attention's output and the two
    layers of the MLP is

        W = U diag(values) V^T

    with the U, V and values, at first, of its singular value decomposition. The loss is that of CLIP-LoRA. No model
    selection: the last step is used.

    Trains `clip`, a copy of the task's CLIP that is an ordinary one again afterwards, and returns the loss of every
    step.
    """
    check_blocks(clip, "CLIP-SVD")
    blocks = [*clip.text_blocks, *clip.vision_blocks]
    weights = [(block.attn, "in_proj_weight", 3) for block in blocks]
    weights += [(m, "weight", 1) for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    for module, name, parts in weights:
        parametrize.register_parametrization(module, name, SingularValues(getattr(module, name), parts))
    losses = train_weights(clip, task, [p for p in clip.parameters() if p.requires_grad], task.recipe.steps)
    for module, name, _ in weights:
        parametrize.remove_parametrizations(module, name)
    return losses


def fit_svd(task: Task) -> LinearHead:
    clip = own_clip(task.clip)
    train_singular_values(clip, task)
    return zero_shot_of(clip, task)


def train_projection(clip: FrozenCLIP, task: Task) -> list[float]:
    """ProLIP: fine-tunes only the last projection of the image tower, with a penalty on its change.

    With the projection's input x (B, Dv), the projection P (Dv, E), its pretrained value P0, the zero-shot classifier W
    (C, E), and s = exp(logit_scale):

        f      = x P / |x P|                                                 (B, E)
        logits = s f W^T                                                     (B, C)
        loss   = cross-entropy + lambda |P - P0|^2,  lambda = 1 / shots

    in full batches. Each step draws new random crops; for the miniature, which only flips, x is cached for both views
    and the steps alternate between them. No model selection: this is the authors' variant without validation images, at
    1e-5, the smallest of the learning rates that they report for it.

    Trains `clip`, a copy of the task's CLIP, and returns the loss of every step.
    """
    recipe, tower = task.recipe, task.clip.vision_tower
    start = tower.visual.proj if isinstance(tower, OpenClipViT) and tower.token_only else None
    if start is None:
        raise ZooError(
            "ProLIP trains the projection of a class token of open_clip's ViT, but this CLIP has none: use clip-lora, "
            "tip-adapter-f or clap instead."
        )
    text, projection = task.text, clip.visual.proj.requires_grad_()

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        logits = clip.logits(F.normalize(x @ projection, dim=-1), text)
        return F.cross_entropy(logits, labels) + recipe.penalty * (projection - start).square().sum()

    optimizer = torch.optim.Adam([projection], recipe.lr, eps=recipe.eps)
    state, schedule = TrainingState().begin(optimizer, task.precision), cosine(recipe.lr, recipe.epochs)
    losses = descend(state, loss, inputs(task), schedule, recipe.epochs, task.progress)
    projection.requires_grad_(False).grad = None
    return losses


def inputs(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of views: the projection's inputs (n, Dv) for all training images, and their labels (n,)."""
    source = task.train_images
    if source.views is None and task.recipe.augment == "crop-flip":
        while True:
            yield unprojected(task.clip, source)[0], source.labels
    for view in cycle(unprojected(task.clip, source)):
        yield view, source.labels


def unprojected(clip: FrozenCLIP, source: ImageSource) -> Tensor:
    """One pass over a source, in order -> inputs (V, n, Dv) of the image tower's projection, on the CPU."""
    tower = clip.vision_tower

    def encode(images: Tensor, patches: bool) -> Tensor:
        return tower.norm(tower.run(tower.embed(images, patches), ())[:, 0])

    return encode_views(source, encode, source.num_views)


def fit_prolip(task: Task) -> LinearHead:
    clip = own_clip(task.clip)
    train_projection(clip, task)
    return zero_shot_of(clip, task)


def norm_parameters(clip: FrozenCLIP) -> list[nn.Parameter]:
    """Make the weights and biases of all LayerNorms of both towers trainable, and return them."""
    norms = [module.requires_grad_() for module in clip.clip.modules() if isinstance(module, nn.LayerNorm)]
    return [p for norm in norms for p in norm.parameters()]


def fit_2sfs(task: Task) -> LinearHead:
    """2SFS: first trains the LayerNorms of both towers, then a classifier on top.

    With image features f (B, E), text features W (C, E) of the dataset's template, and s = exp(logit_scale):

        stage 1:  s f W^T            trains weights and biases of all LayerNorms, in a copy of CLIP
        stage 2:  s f w_c^T / |w_c|  trains w (C, E), initialised to stage 1's W; both towers are frozen

    both with cross-entropy, each with a new optimizer and cosine. Stage 1 takes 60 % of 300 steps per shot, stage 2 the
    rest. For the miniature, which only flips, stage 2 caches the features of both views. No model selection: the last
    step is used.
    """
    clip = own_clip(task.clip)
    train_weights(clip, task, norm_parameters(clip), task.recipe.stages[0])
    weight, _ = train_classifier(clip, task)
    return task.text_head(F.normalize(weight, dim=-1), clip=clip)


def train_classifier(clip: FrozenCLIP, task: Task) -> tuple[Tensor, list[float]]:
    """Stage 2 on a copy of CLIP: the classifier (C, E), not normalised, and the loss of every step."""
    source = task.train_images
    weight = clip.zero_shot_classifier(check_classnames(task.classnames), task.template).requires_grad_()
    if source.views is not None or task.recipe.augment != "crop-flip":
        source = replace(source, views=source.for_model(clip).features())

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            features = clip.encode_image(inputs, source.patches)
        return F.cross_entropy(clip.logits(features, F.normalize(weight, dim=-1)).float(), labels)

    losses = base.train_steps(task, [weight], loss, source, task.recipe.stages[1])
    return weight.requires_grad_(False), losses
