"""Metrics of logits (n, C) and labels (n,). Percentages are rounded to a hundredth."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

BINS = 15


class Bin(NamedTuple):
    """The predictions whose confidence lies in one range: their number, mean confidence and accuracy, from 0 to 1."""

    images: int
    confidence: float
    accuracy: float


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in percent, rounded to a hundredth: logits (n, C), labels (n,)."""
    return round(100 * (logits.argmax(-1) == labels).float().mean().item(), 2)


def reliability(logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> list[Bin]:
    """The bins of a reliability diagram (Guo et al., On Calibration of Modern Neural Networks, ICML 2017), without
    empty ones: bin i of `bins` has the predictions whose highest probability is in (i / bins, (i + 1) / bins]."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    hits = (predicted == labels).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    members = [bin_of == i for i in bin_of.unique()]
    return [Bin(int(m.sum()), confidence[m].mean().item(), hits[m].mean().item()) for m in members]


def expected_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """ECE in percent: the mean over all predictions of |accuracy - mean confidence| of the prediction's bin."""
    gaps = (part.images * abs(part.accuracy - part.confidence) for part in reliability(logits, labels, bins))
    return round(100 * sum(gaps) / len(labels), 2)


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean of -log of the label's probability, in nats, rounded to four digits."""
    return round(F.cross_entropy(logits.double(), labels).item(), 4)


def confusion_counts(logits: torch.Tensor, labels: torch.Tensor, classes: int) -> list[list[int]]:
    """The number of images of each class (rows) predicted as each class (columns)."""
    pairs = labels * classes + logits.argmax(-1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes).tolist()


def distinct_names(classnames: Sequence[str]) -> list[str]:
    """The names, each once: if classes share a name, as in two pairs of ImageNet's, later ones get their label."""
    return [f"{name} ({label})" if name in classnames[:label] else name for label, name in enumerate(classnames)]


def accuracy_by_class(logits: torch.Tensor, labels: torch.Tensor, classnames: Sequence[str]) -> dict[str, float | None]:
    """Top-1 accuracy of every class in percent by its `distinct_names`, None for a class without images."""
    hits = (logits.argmax(-1) == labels).double()
    accuracies: dict[str, float | None] = {}
    for label, name in enumerate(distinct_names(classnames)):
        class_hits = hits[labels == label]
        accuracies[name] = round(100 * class_hits.mean().item(), 2) if len(class_hits) else None
    return accuracies
