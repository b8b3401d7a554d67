"""DCP as one of the methods: the same images, budget and seeds as the baselines."""

from collections.abc import Sequence
from typing import Any

import torch

from dcp_zoo.methods.base import EVAL_BATCH, Task
from dcp_zoo.model.dcp import DCP
from dcp_zoo.training.loop import fit_dcp, predict, seed_everything
from dcp_zoo.training.recipes import Recipe, default_recipe
from dcp_zoo.training.sources import ImageSource


class DCPClassifier:
    """A trained DCP, rounded and calibrated like a checkpoint: its results are those of `dcp-zoo train`.

    Attributes:
        contexts: the contexts it can be tested with.
        context: the current one.
    """

    contexts = ("calibrated", "batch")

    def __init__(self, model: DCP, task: Task, info: dict[str, Any]) -> None:
        self.model, self.recipe, self.progress, self.info = model.eval(), task.recipe, task.progress, info

    @property
    def context(self) -> str:
        return self.model.context

    @context.setter
    def context(self, context: str) -> None:
        self.model.context = context

    def logits(self, source: ImageSource) -> torch.Tensor:
        """Logits (n, C) of all images; with the context "batch" in batches of the recipe's `eval_batch_size`."""
        batch_size = self.recipe.eval_batch_size if self.context == "batch" else EVAL_BATCH
        return predict(source.for_model(self.model), batch_size, progress=self.progress)

    def set_classnames(self, classnames: Sequence[str], template: str | None = None) -> None:
        self.model.set_classnames(classnames)


def recipe(model: str, dataset: str, shots: int, protocol: str) -> Recipe:
    return default_recipe(model, dataset)


def fit(task: Task) -> DCPClassifier:
    assert task.train is not None
    seed_everything(task.seed)
    model = DCP(task.clip.clip, task.classnames, task.recipe.config, tokenizer=task.clip.tokenizer)
    model.pretrained_cfg = task.clip.pretrained_cfg
    model.to(task.clip.device)
    source = task.train.for_model(model)
    info = fit_dcp(source, task.recipe, val=task.val, seed=task.seed, precision=task.precision, progress=task.progress)
    return DCPClassifier(model, task, info)
