"""What classifiers on features share: class means, minima of convex functions, the scale of text logits.

Features (n, E) and labels (n,), computed on the CPU.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dcp_zoo.errors import ZooError

ROWS_AT_A_TIME = 8192  # rows converted to float64 at a time
REMEMBERED = 5  # steps that L-BFGS keeps


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, tolerance: float = 1e-7) -> Tensor:
    """The point where a convex function of a tensor is lowest, by L-BFGS from `start`: after so many steps,
    or where no entry of the gradient is larger than the tolerance."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=steps,
        tolerance_grad=tolerance,
        history_size=REMEMBERED,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value = loss(point)
        (point.grad,) = torch.autograd.grad(value, point)
        return value

    optimizer.step(closure)
    return point.detach()


def text_scales(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The scales a (S,) of text logits z (n, C), by S training sets of the same images with the weights w
    (S, n): each minimises sum_i w_i cross-entropy(a z_i) + (log a)^2 / 2."""
    logits = logits.double()
    weights = weights.double()

    def loss(log_scales: Tensor) -> Tensor:
        scaled = log_scales.exp()[:, None, None] * logits  # (S, n, C)
        correct = scaled[:, torch.arange(len(labels)), labels]
        return (weights * (scaled.logsumexp(2) - correct)).sum() + log_scales.square().sum() / 2

    return minimum(loss, weights.new_zeros(len(weights)), steps=100).exp().float()


def text_scale(logits: Tensor, labels: Tensor) -> float:
    """`text_scales` by all images alike."""
    return text_scales(logits, labels, torch.ones(1, len(labels))).item()


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """features (n, E), labels (n,) -> class means (C, E) in float64; ZooError if a class has no features."""
    missing = sorted(set(range(classes)).difference(labels.tolist()))
    if missing:
        listed = ", ".join(map(str, missing[:5]))
        raise ZooError(f"No training image has label {listed}: every class needs at least one. Add images or drop it.")
    return weighted_class_means(features, labels, classes, torch.ones(len(labels)))


def weighted_class_means(features: Tensor, labels: Tensor, classes: int, weights: Tensor) -> Tensor:
    """`class_means` of features with weights (n,); 0 for a class without features."""
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    for rows, row_labels in in_float64(weights[:, None] * features, labels):
        sums.index_add_(0, row_labels, rows)
    totals = torch.bincount(labels, weights.double(), classes)
    return sums / totals.masked_fill(totals == 0, 1)[:, None]


def in_float64(features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of many rows at a time, with their labels."""
    for rows, row_labels in zip(features.split(ROWS_AT_A_TIME), labels.split(ROWS_AT_A_TIME), strict=True):
        yield rows.double(), row_labels
