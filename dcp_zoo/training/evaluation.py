"""Run a head on labelled images; its answers: accuracy with its interval, by class, confusions, mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from dcp_zoo.data import Item
from dcp_zoo.training.accuracy import Accuracy
from dcp_zoo.training.device import autocast
from dcp_zoo.training.metrics import distinct_names, top1
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.training.sources import ImageSource, Progress, no_progress

EVAL_BATCH = 100  # images; logits do not depend on it, except while the stats is not calibrated yet


class Confusion(NamedTuple):
    """How many `times` images of class `name` were classified as `predicted`, of the `images` of this class."""

    name: str
    predicted: str
    times: int
    images: int


class Mistake(NamedTuple):
    """An image of class `name` that was classified as `predicted` with this probability."""

    item: Item
    name: str
    predicted: str
    probability: float

    @property
    def path(self) -> str:
        """The image's path, or for an image in memory its key."""
        return self.item.path if isinstance(self.item.path, str) else self.item.key


@dataclass(frozen=True)
class Evaluation:
    """The answers of a head on labelled images.

    Attributes:
        classnames: of the head.
        items: the n images with their labels.
        logits: (n, C), on the CPU.
    """

    classnames: Sequence[str]
    items: Sequence[Item]
    logits: torch.Tensor

    @cached_property
    def labels(self) -> torch.Tensor:
        """Labels (n,)."""
        return torch.tensor([item.label for item in self.items])

    @cached_property
    def predicted(self) -> torch.Tensor:
        """Predicted labels (n,)."""
        return self.logits.argmax(-1)

    @property
    def accuracy(self) -> Accuracy:
        """Over all images."""
        return Accuracy("", int((self.predicted == self.labels).sum()), len(self.items))

    @property
    def per_class(self) -> list[Accuracy]:
        """One entry for each class that has images, in the order of the classes, by its `distinct_names`."""
        hits = self.predicted == self.labels
        classes = [(name, self.labels == label) for label, name in enumerate(distinct_names(self.classnames))]
        return [Accuracy(name, int(hits[own].sum()), int(own.sum())) for name, own in classes if own.any()]

    @property
    def confused_pairs(self) -> list[Confusion]:
        """Pairs of classes by the number of images confused, most first; without pairs that were never confused."""
        sizes = torch.bincount(self.labels, minlength=len(self.classnames)).tolist()
        wrong = (self.predicted != self.labels).nonzero().flatten()
        pairs, counts = torch.stack([self.labels[wrong], self.predicted[wrong]], 1).unique(dim=0, return_counts=True)
        found = [
            Confusion(self.classnames[true], self.classnames[other], count, sizes[true])
            for (true, other), count in zip(pairs.tolist(), counts.tolist(), strict=True)
        ]
        return sorted(found, key=lambda pair: -pair.times)

    @property
    def mistakes(self) -> list[Mistake]:
        """The images that were classified wrongly, those with the most probable wrong answer first."""
        sure = self.logits.softmax(-1).amax(-1)
        wrong = (self.predicted != self.labels).nonzero().flatten().tolist()
        names = self.classnames
        return [
            Mistake(self.items[i], names[self.items[i].label], names[int(self.predicted[i])], round(float(sure[i]), 4))
            for i in sorted(wrong, key=lambda i: -float(sure[i]))
        ]


@torch.inference_mode()
def predict(
    source: ImageSource, batch_size: int, precision: str = "float32", progress: Progress = no_progress
) -> torch.Tensor:
    """Logits (n, C) of all images of a source, in order, on the CPU, in the model's current stats."""
    model = source.model.eval()
    device = next(model.parameters()).device
    logits = []
    with autocast(device, precision):
        for inputs, _ in progress(source.batches(batch_size), "test images", -(-len(source.items) // batch_size)):
            logits.append(model(inputs.to(device), patches=source.patches).float().cpu())
    return torch.cat(logits)


def eval_batch(model: Any, eval_batch_size: int) -> int:
    """Images per batch of an evaluation in a model's stats: that of its recipe where they share a stats."""
    return eval_batch_size if model.stats == "batch" else EVAL_BATCH


def measure(
    source: ImageSource, recipe: Recipe, precision: str = "float32", progress: Progress = no_progress
) -> tuple[dict[str, float], Evaluation]:
    """Top-1 accuracy in percent with the stored statistics, and with the batch statistics as the release evaluates; and
    the answers in the first of them that the model has."""
    model, metrics, evaluations = source.model, {}, []
    for stats in ("stored", "batch"):
        if stats == "batch" or model.stored_stats is not None:
            model.stats = stats
            logits = predict(source, eval_batch(model, recipe.eval_batch_size), precision, progress)
            metrics[f"top1_{stats}"] = top1(logits, source.labels)
            evaluations.append(Evaluation(model.classnames, source.items, logits))
    model.stats = None
    return metrics, evaluations[0]
