"""DCP (Liu et al., Findings of ACL 2023): prompts in both towers, which rewrite each other.

Its equations are in docs/method.md, and the model is `dcp_zoo.heads.dcp.DCP`. The configuration is `Recipe`,
whose defaults and named variants are in `dcp_zoo.training.recipes`, because help texts need them without
torch. After training the prompts are rounded as they will be stored, and the stored statistics measured.

With the text features t (C, E) and image features f (B, E) of the model, and those of zero-shot CLIP, t' and
f',

    loss = cross-entropy + clip_reg * (25 mean |t - t'| + 10 mean |f - f'|)

The second term, against overfitting to a few images, is that of PromptSRC (Khattak et al., ICCV 2023); the
paper has clip_reg = 0.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import TEMPLATE
from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.errors import ZooError
from dcp_zoo.features import ImageLoader
from dcp_zoo.heads.config import Abilities
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.training.loop import Loss, train
from dcp_zoo.training.methods.base import Method
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.training.task import Task

TEXT_WEIGHT = 25.0  # PromptSRC's
IMAGE_WEIGHT = 10.0


def fit(task: Task) -> DCP:
    """Train a DCP from fresh prompts, round the trained tensors to float16, and measure the stored
    statistics."""
    recipe: Recipe = task.recipe
    texts = task.texts if isinstance(task.texts, Mapping) else TEMPLATE
    model = DCP(task.clip, task.classnames, recipe.config, texts=texts)
    images = task.images
    targets = None
    if recipe.clip_reg:
        targets = images.table(views=images.training_views).embeddings.rows(*images.training_views)
    with clip_in(model, task.precision):
        loss_of = regularised_loss(model, recipe.clip_reg) if recipe.clip_reg else None
        losses = train(task, model, loss_of=loss_of, targets=targets)
    round_and_store_stats(model, images)  # measured as the head will be used
    tenth = max(1, len(losses) // 10)  # enough to see later whether it learnt
    model.info = {"first_loss": fmean(losses[:tenth]), "last_loss": fmean(losses[-tenth:])}
    return model


def regularised_loss(model: DCP, clip_reg: float) -> Loss:
    """The loss of images, labels (B,) and targets f' (B, E), see the module; reported is the cross-entropy
    alone."""
    clip = model.encoder
    zero_shot = clip.zero_shot_classifier(model.classnames, model.texts).float()  # t'

    def loss_of(inputs: Inputs, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        features, text = model.encode(inputs)
        cross_entropy = F.cross_entropy(clip.logits(features, text).float(), labels)
        text_distance = F.l1_loss(text.float(), zero_shot)
        image_distance = F.l1_loss(features.float(), targets.float())
        return cross_entropy + clip_reg * (TEXT_WEIGHT * text_distance + IMAGE_WEIGHT * image_distance), cross_entropy

    return loss_of


@contextmanager
def clip_in(model: DCP, precision: str) -> Iterator[None]:
    """CLIP's weights in this precision, so that they take less memory on the device; then as before. Trained
    parameters and the logit scale stay in float32."""
    if precision == "float32":
        yield
        return
    weights = [p for p in model.encoder.clip.parameters() if p.numel() > 1 and p.is_floating_point()]
    before = [p.data.cpu() for p in weights]
    for p in weights:
        p.data = p.data.to(getattr(torch, precision))
    try:
        yield
    finally:
        for p, exact in zip(weights, before, strict=True):
            p.data = exact.to(p.device)


@torch.no_grad()
def round_and_store_stats(model: DCP, images: ImageLoader) -> None:
    """After training: round the trained tensors to float16, as they will be stored, and measure the stored
    statistics on the unaugmented training images. ZooError for numbers beyond float16's range: training
    diverged."""
    for tensor in model.to_state().values():
        tensor.copy_(tensor.half())
    model.store_stats(images.in_order(64))
    if model.stored_stats is not None:
        model.stored_stats.copy_(model.stored_stats.half())
    if not all(tensor.isfinite().all() for tensor in model.to_state().values()):
        problem = "Training diverged: the prompts became too large for float16."
        raise ZooError(f"{problem} Lower the learning rate (--set lr=...), and start again (--overwrite).")


DCP_METHOD = Method(
    "dcp",
    "DCP",
    "Liu et al., Deeply Coupled Cross-Modal Prompt Learning, Findings of ACL 2023",
    fit,
    Recipe,
    Abilities(coupled=True),
)
