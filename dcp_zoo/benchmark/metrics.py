"""What is measured of logits (n, C) and labels (n,) beside top-1. Percentages are rounded to a hundredth."""

from collections.abc import Sequence

import torch

BINS = 15


def expected_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """ECE in percent (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).

    Answers are put into bins of equal width by their confidence, the highest probability; the error is the mean over
    all answers of |accuracy - mean confidence| of the answer's bin.
    """
    confidence, answer = logits.double().softmax(-1).max(-1)
    gap = (answer == labels).double() - confidence
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bin i is (i / bins, (i + 1) / bins]
    sums = torch.zeros(bins, dtype=torch.double).index_add_(0, bin_of, gap)
    return round(100 * sums.abs().sum().item() / len(labels), 2)


def confusion_counts(logits: torch.Tensor, labels: torch.Tensor, classes: int) -> list[list[int]]:
    """How many images of each class (rows) were taken for each class (columns)."""
    pairs = labels * classes + logits.argmax(-1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes).tolist()


def accuracy_by_class(logits: torch.Tensor, labels: torch.Tensor, classnames: Sequence[str]) -> dict[str, float | None]:
    """Top-1 accuracy of every class in percent, None where it has no image. Of classes that share a name, as two
    pairs of ImageNet's do, the later ones carry their label."""
    hits = (logits.argmax(-1) == labels).double()
    found: dict[str, float | None] = {}
    for label, name in enumerate(classnames):
        own = hits[labels == label]
        found[f"{name} ({label})" if name in found else name] = round(100 * own.mean().item(), 2) if len(own) else None
    return found
