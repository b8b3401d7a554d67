"""Metrics besides top-1, of logits (n, C) and labels (n,). Percentages are rounded to a hundredth."""

from collections.abc import Sequence

import torch

BINS = 15


def expected_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """ECE in percent (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).

    Predictions are grouped into bins of equal width by their confidence, the highest probability; the error is the mean
    over all predictions of |accuracy - mean confidence| of the prediction's bin.
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    gap = (predicted == labels).double() - confidence
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bin i is (i / bins, (i + 1) / bins]
    sums = torch.zeros(bins, dtype=torch.double).index_add_(0, bin_of, gap)
    return round(100 * sums.abs().sum().item() / len(labels), 2)


def confusion_counts(logits: torch.Tensor, labels: torch.Tensor, classes: int) -> list[list[int]]:
    """The number of images of each class (rows) predicted as each class (columns)."""
    pairs = labels * classes + logits.argmax(-1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes).tolist()


def accuracy_by_class(logits: torch.Tensor, labels: torch.Tensor, classnames: Sequence[str]) -> dict[str, float | None]:
    """Top-1 accuracy of every class in percent, None for a class without images. If classes share a name, as in two
    pairs of ImageNet's, the label is appended to the later ones."""
    hits = (logits.argmax(-1) == labels).double()
    accuracies: dict[str, float | None] = {}
    for label, name in enumerate(classnames):
        unique = f"{name} ({label})" if name in accuracies else name
        class_hits = hits[labels == label]
        accuracies[unique] = round(100 * class_hits.mean().item(), 2) if len(class_hits) else None
    return accuracies
