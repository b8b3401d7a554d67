"""Run a head on labelled images, and measure its predictions: accuracy with its interval, per class,
confused classes, mistakes, and how far the probabilities can be trusted. Percentages are rounded to a
hundredth."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.accuracy import Accuracy
from dcp_zoo.answers import Outputs, Thresholds
from dcp_zoo.backbone._torch import in_eval_mode
from dcp_zoo.backbone.clip import parts_of
from dcp_zoo.data import Item
from dcp_zoo.features import ImageLoader, LabelledItems
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import NO_CLASSIFIER
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction.heads import outputs_of_loader

EVAL_BATCH = 100  # images; logits do not depend on it, except with batch statistics
BINS = 15


class Confusion(NamedTuple):
    """How many `times` images of class `name` were classified as `predicted`, of the `images` of this
    class."""

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


class Bin(NamedTuple):
    """The predictions whose confidence lies in one range: their number, mean confidence and accuracy, from 0
    to 1."""

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation(LabelledItems):
    """The predictions of a head on labelled images. `logits` (n, C), for its class names, are on the CPU;
    `refused` (n,): which images the head's threshold rejects, if it has one; `at_most`: of `Accuracy`."""

    classnames: Sequence[str]
    items: Sequence[Item]
    logits: Tensor
    refused: Tensor | None = None
    at_most: float | None = None

    @classmethod
    def of(cls, outputs: Outputs, classnames: Sequence[str], items: Sequence[Item]) -> "Evaluation":
        """Of what a head says of these images."""
        refused = None if outputs.rejected is None else torch.from_numpy(outputs.rejected)
        return cls(classnames, items, torch.from_numpy(outputs.logits), refused)

    @classmethod
    def joined(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Of the images of all parts, which have the same classes."""
        items = [item for part in parts for item in part.items]
        refused = [part.refused for part in parts if part.refused is not None]
        all_refused = torch.cat(refused) if len(refused) == len(parts) else None
        return cls(parts[0].classnames, items, torch.cat([part.logits for part in parts]), all_refused)

    def __repr__(self) -> str:
        return (
            f"<Evaluation: {self.accuracy.correct} of {len(self.items)} images right, {len(self.classnames)} classes>"
        )

    @cached_property
    def predicted(self) -> Tensor:
        """Predicted labels (n,)."""
        return self.logits.argmax(-1)

    @property
    def accuracy(self) -> Accuracy:
        """Over all images."""
        every = torch.ones(len(self.items), dtype=torch.bool)
        return self._accuracy("", every)._replace(untested=self.untested, at_most=self.at_most)

    @property
    def untested(self) -> list[str]:
        """The classes without an image here, of which no accuracy is known."""
        tested = set(self.labels.tolist())
        return [name for label, name in enumerate(self.classnames) if label not in tested]

    def _accuracy(self, name: str, own: Tensor) -> Accuracy:
        sizes = torch.bincount(self.groups[own]).double()
        independent = (sizes.sum() ** 2 / sizes.square().sum()).item() if sizes.amax() > 1 else None
        return Accuracy(name, int((self.predicted == self.labels)[own].sum()), int(own.sum()), independent)

    @property
    def balanced(self) -> float | None:
        """The mean of the classes' accuracies in percent; None if they have as many images each: then
        equal."""
        sizes = {row.images for row in self.per_class}
        return round(mean(row.percent for row in self.per_class), 2) if len(sizes) > 1 else None

    @property
    def info(self) -> Values:
        """What a head's `info` says of it besides the accuracies."""
        independent = self.accuracy.independent
        said = {
            "test_images": len(self.items),
            "independent_images": independent and round(independent, 1),
            "at_most": self.at_most and round(self.at_most, 2),
            "balanced_top1": self.balanced,
            "untested": self.untested or None,
            "refused": None if self.refused is None else round(100 * self.refused.float().mean().item(), 1),
        }
        return {name: value for name, value in said.items() if value is not None}

    @property
    def per_class(self) -> list[Accuracy]:
        """One entry for each class that has images, in the order of the classes, by its name; if classes
        share a name, as in two pairs of ImageNet's, later ones get their label."""
        rows = []
        for label, name in enumerate(self.classnames):
            own = self.labels == label
            if own.any():
                rows.append(self._accuracy(f"{name} ({label})" if name in self.classnames[:label] else name, own))
        return rows

    @property
    def confusion_matrix(self) -> Tensor:
        """The number of images (C, C) of each class, the row, that were classified as each class, the
        column."""
        classes = len(self.classnames)
        return torch.bincount(self.labels * classes + self.predicted, minlength=classes**2).view(classes, classes)

    @property
    def confused_pairs(self) -> list[Confusion]:
        """The entries of `confusion_matrix` off its diagonal, without zeros, most images first."""
        names = self.classnames
        sizes = torch.bincount(self.labels).tolist()
        wrong = self.confusion_matrix.fill_diagonal_(0)
        pairs = [Confusion(names[i], names[j], int(wrong[i, j]), sizes[i]) for i, j in wrong.nonzero().tolist()]
        return sorted(pairs, key=lambda pair: -pair.times)

    @property
    def mistakes(self) -> list[Mistake]:
        """The images that were classified wrongly, those with the most probable wrong class first."""
        sure = self.logits.softmax(-1).amax(-1)
        wrong = (self.predicted != self.labels).nonzero().flatten().tolist()
        names = self.classnames
        return [
            Mistake(self.items[i], names[self.items[i].label], names[int(self.predicted[i])], round(float(sure[i]), 4))
            for i in sorted(wrong, key=lambda i: -float(sure[i]))
        ]


def measure(
    head: Head, images: ImageLoader, batch_size: int = EVAL_BATCH, all_modes: bool = True
) -> tuple[dict[str, float], Evaluation]:
    """Top-1 accuracy in percent in each mode of `evaluations`, and the first of these."""
    by_mode = evaluations(head, images, batch_size, all_modes)
    return top1_by_mode(by_mode), next(iter(by_mode.values()))


@torch.no_grad()
def evaluations(
    head: Head, images: ImageLoader, batch_size: int = EVAL_BATCH, all_modes: bool = True
) -> dict[str, Evaluation]:
    """What a head says of images in each way that it is measured, the default first: with the stored
    statistics, where it also says which images it rejects, with those of batches as the release evaluates,
    and without the text probe. With `all_modes` False, only as the head is."""
    thresholds = Thresholds(None if head.cannot_reject else head.rejection_threshold())
    view = copy.copy(head)  # with the same tensors, and statistics of its own
    outputs: dict[str, Outputs] = {}
    without_probe: dict[str, Outputs] = {}
    with in_eval_mode(view):
        for stats in head.stats_modes if all_modes else [view.stats]:
            view.stats = stats
            outputs[stats] = outputs_of_loader(view, images, batch_size, thresholds)
            features = outputs[stats].features
            if all_modes and features is not None and view.text_probe is not None and view.fc is None:
                weight, bias = (part.detach().float().cpu() for part in view.method_linear())
                own = torch.from_numpy(features[:, : weight.shape[1]]) * math.sqrt(parts_of(view.readings))
                without_probe[NO_CLASSIFIER] = Outputs(F.linear(own, weight, bias).numpy())
    every = (outputs | without_probe).items()
    return {mode: Evaluation.of(each, head.classnames, images.items) for mode, each in every}


def top1_by_mode(by_mode: Mapping[str, Evaluation]) -> dict[str, float]:
    """Top-1 accuracy in percent, by "top1_" and the mode."""
    return {f"top1_{mode}": top1(each.logits, each.labels) for mode, each in by_mode.items()}


def top1(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent, rounded to a hundredth: logits (n, C), labels (n,)."""
    return round(100 * (logits.argmax(-1) == labels).float().mean().item(), 2)


def reliability(logits: Tensor, labels: Tensor) -> list[Bin]:
    """The bins of a reliability diagram (Guo et al., On Calibration of Modern Neural Networks, ICML 2017),
    without empty ones: bin i of `BINS` has the predictions whose highest probability is in (i / BINS, (i +
    1) / BINS]."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    hits = (predicted == labels).double()
    bin_of = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    members = [bin_of == i for i in bin_of.unique()]
    return [Bin(int(m.sum()), confidence[m].mean().item(), hits[m].mean().item()) for m in members]


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """ECE in percent: the mean over all predictions of |accuracy - mean confidence| of the prediction's
    bin."""
    gaps = (part.images * abs(part.accuracy - part.confidence) for part in reliability(logits, labels))
    return round(100 * sum(gaps) / len(labels), 2)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """The mean of -log of the label's probability, in nats, rounded to four digits."""
    return round(F.cross_entropy(logits.double(), labels).item(), 4)
