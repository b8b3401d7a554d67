"""DCP (Liu et al., Findings of ACL 2023): prompts in both towers, which rewrite each other.

Its equations are in docs/method.md, and the model is `dcp_zoo.heads.dcp.DCP`. The configuration is `Recipe`, whose
defaults and named variants are in `dcp_zoo.training.recipes`, because help texts need them without torch. After
training the prompts are rounded as they will be stored, and the stored statistics measured.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean

import torch

from dcp_zoo.backbone.classes import TEMPLATE
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.config import Abilities
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.training.device import cast_frozen
from dcp_zoo.training.methods.base import Method, Task, train_prompts
from dcp_zoo.training.methods.text_probe import probe_views
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.training.sources import ImageSource


def fit(task: Task) -> DCP:
    """Train a DCP from fresh prompts, round the trained tensors to float16, and measure the stored statistics."""
    recipe: Recipe = task.recipe
    texts = task.texts if isinstance(task.texts, Mapping) else TEMPLATE
    model = DCP(task.clip, task.classnames, recipe.config, texts=texts)
    source, fixed, targets = task.train_images, task.plain_train, None
    if recipe.clip_reg:
        targets = fixed.features(max(source.num_views, probe_views(fixed)), task.progress)
    with clip_in(model, task.precision):
        losses = train_prompts(task, model, source, targets=targets)
    round_and_store_stats(model, fixed)  # measured as the head will be used
    tenth = max(1, len(losses) // 10)  # enough to tell later whether it learnt
    model.info = {"first_loss": fmean(losses[:tenth]), "last_loss": fmean(losses[-tenth:])}
    return model


@contextmanager
def clip_in(model: DCP, precision: str) -> Iterator[None]:
    """CLIP's weights in this precision, so that they take less memory on the device; then as before."""
    weights = [p.data.cpu() for p in model.encoder.clip.parameters()]
    cast_frozen(model, precision)
    try:
        yield
    finally:
        for p, before in zip(model.encoder.clip.parameters(), weights, strict=True):
            p.data = before.to(p.device)


@torch.no_grad()
def round_and_store_stats(model: DCP, source: ImageSource) -> None:
    """After training: round the trained tensors to float16, as they will be stored, and measure the stored statistics
    on the unaugmented training images. ZooError for numbers beyond float16's range: training diverged."""
    for tensor in model.to_state().values():
        tensor.copy_(tensor.half())
    model.store_stats(source.batches(64))
    if model.stored_stats is not None:
        model.stored_stats.copy_(model.stored_stats.half())
    if not all(tensor.isfinite().all() for tensor in model.to_state().values()):
        problem = "Training diverged: the prompts became too large for float16."
        raise ZooError(f"{problem} Lower the learning rate (--set lr=...), and start again (--overwrite).")


PAPER = "Liu et al., Deeply Coupled Cross-Modal Prompt Learning, Findings of ACL 2023"
DCP_METHOD = Method("dcp", "DCP", PAPER, fit, Recipe, Abilities(coupled=True))
