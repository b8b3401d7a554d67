"""DCP as one of the methods: the same images, budget and seeds as the baselines."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of
from dcp_zoo.model.checkpoint import WEIGHTS_NAME, read_tensors
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.names import Texts
from dcp_zoo.training.device import seed_everything
from dcp_zoo.training.evaluation import eval_batch, predict
from dcp_zoo.training.fit import fit_dcp
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.sources import ImageSource
from dcp_zoo.training.state import TrainingState


class DCPClassifier:
    """A trained DCP, rounded and calibrated like a checkpoint: its results are those of `dcp-zoo train`.

    Attributes:
        modes: the modes it can be tested with.
        stats: the current one.
    """

    modes = ("stored", "batch")

    def __init__(self, model: DCP, task: Task, info: dict[str, Any]) -> None:
        self.model, self.recipe, self.progress, self.info = model.eval(), task.recipe, task.progress, info

    @property
    def stats(self) -> str:
        return self.model.stats

    @stats.setter
    def stats(self, stats: str) -> None:
        self.model.stats = stats

    def logits(self, source: ImageSource) -> torch.Tensor:
        """Logits (n, C) of all images; with the stats "batch" in batches of the recipe's `eval_batch_size`."""
        batch_size = eval_batch(self.model, self.recipe.eval_batch_size)
        return predict(source.for_model(self.model), batch_size, progress=self.progress)

    def save(self, folder: Path, info: dict[str, Any]) -> str:
        """Write the head to a checkpoint folder, and return the sha256 of its weights.

        Raises:
            ZooError: the folder is not writable, or what was written reads back differently in a single bit.
        """
        self.model.save_pretrained(folder, **info)
        written, state = read_tensors(folder), self.model.head_state()
        changed = [name for name, t in state.items() if not torch.equal(written[name], t.float().cpu())]
        if changed:
            raise ZooError(f"{folder / WEIGHTS_NAME} does not hold the weights that were trained: {changed[0]}.")
        return sha256_of(folder / WEIGHTS_NAME)

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.model.set_classnames(classnames)


def fit(task: Task) -> DCPClassifier:
    seed_everything(task.seed)
    described = None if isinstance(task.template, str) else task.template
    model = DCP(
        task.clip.clip, task.classnames, task.recipe.config, tokenizer=task.clip.tokenizer, descriptions=described
    )
    model.architecture, model.clip_source = task.clip.architecture, task.clip.clip_source
    model.pretrained_cfg = task.clip.pretrained_cfg
    model.to(task.clip.device)
    source = task.train_images.for_model(model)
    state = TrainingState()
    info = fit_dcp(
        source,
        task.recipe,
        val=task.val,
        seed=task.seed,
        precision=task.precision,
        progress=task.progress,
        state=state,
    )
    tenth = max(1, len(state.losses) // 10)  # enough to tell later whether it learnt
    info |= {"first_loss": fmean(state.losses[:tenth]), "last_loss": fmean(state.losses[-tenth:])}
    return DCPClassifier(model, task, info)
