"""What happens after each epoch of training: curves, and early stopping; a tracker such as Weights & Biases is a few
lines, see docs/python.md."""

from typing import NamedTuple

import torch
from torch import nn

from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values

VALIDATIONS = 20  # times that the validation images are classified during a run, spread evenly


class Epoch(NamedTuple):
    """One epoch of a run.

    Attributes:
        epoch, step: completed so far.
        lr: learning rate of the epoch.
        loss: mean training loss of the epoch.
        val_loss, val_top1: loss and top-1 accuracy in percent on the validation images; None where not measured.
    """

    epoch: int
    step: int
    lr: float
    loss: float
    val_loss: float | None = None
    val_top1: float | None = None

    @property
    def values(self) -> dict[str, float]:
        """The numbers by name, without those that are None."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Callback:
    """Base class of callbacks: override what you need. They see the model while it trains, in training mode. A run that
    resumes calls `on_start` again, and `on_epoch` only for the remaining epochs."""

    def on_start(self, model: nn.Module, recipe: Values) -> None:
        """Called before the first step."""

    def on_epoch(self, model: nn.Module, epoch: Epoch) -> bool | None:
        """Called after every epoch; True ends the training."""

    def on_end(self, model: nn.Module) -> None:
        """Called after the last step, before the statistics are stored and the classifier is fitted."""

    def close(self) -> None:
        """Called in the end of every run that was started, also of one that is stopped or fails."""


class History(Callback):
    """Keeps every epoch in the list `epochs`."""

    def __init__(self) -> None:
        self.epochs: list[Epoch] = []

    def on_start(self, model: nn.Module, recipe: Values) -> None:
        self.epochs = []

    def on_epoch(self, model: nn.Module, epoch: Epoch) -> None:
        self.epochs.append(epoch)


class EarlyStopping(Callback):
    """Stops training when the validation accuracy no longer improves, and restores the best weights. `patience`
    counts validations, of which a run has at most 20, without a better accuracy, or an equal one with a lower loss. A
    run that resumes counts from there. Raises ZooError in a run without validation images."""

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience

    def on_start(self, model: nn.Module, recipe: Values) -> None:
        self.best: tuple[float, float] | None = None
        self.best_epoch, self.waited = 0, 0
        self.left = -(-recipe["epochs"] // VALIDATIONS)  # epochs until the validation images are classified
        self.weights: dict[str, torch.Tensor] = {}

    def on_epoch(self, model: nn.Module, epoch: Epoch) -> bool:
        self.left -= 1
        if epoch.val_top1 is None or epoch.val_loss is None:
            if self.best is None and self.left <= 0:
                raise ZooError("Early stopping needs validation images: pass validation=(images, labels).")
            return False
        score = (epoch.val_top1, -epoch.val_loss)
        if self.best is None or score > self.best:
            self.best, self.best_epoch, self.waited = score, epoch.epoch, 0
            self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        else:
            self.waited += 1
        return self.waited >= self.patience

    @torch.no_grad()
    def on_end(self, model: nn.Module) -> None:
        for name, weight in self.weights.items():
            model.get_parameter(name).copy_(weight)
