"""What classifiers on features share: class means, where a convex loss is lowest, the scale of logits.

Features (n, E) and labels (n,), computed on the CPU.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values

ROWS_AT_A_TIME = 8192  # rows converted to float64 at a time
Slope = Callable[[Tensor], tuple[Tensor, Tensor]]  # of a loss: its value and gradient at a place


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor, max_iter: int) -> Tensor:
    """Where a convex loss is lowest, by torch's L-BFGS with a line search from `start`."""

    def slope(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            value = loss(x.requires_grad_())
        return value.detach(), torch.autograd.grad(value, x)[0]

    return lowest_point(slope, start, max_iter)


def lowest_point(slope: Slope, start: Tensor, max_iter: int, tolerance_grad: float = 1e-7) -> Tensor:
    """`minimum`, of a loss whose value and gradient are given."""
    point = start.clone().requires_grad_()
    options: Values = {"max_iter": max_iter, "tolerance_grad": tolerance_grad, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([point], **options)

    @torch.no_grad()
    def closure() -> Tensor:
        value, point.grad = slope(point.detach())
        return value

    optimizer.step(closure)
    return point.detach()


def text_scale(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """a: minimises the cross-entropy (sum, with weights (n,) of the rows) of a times logits (n, C) + (log a)^2 / 2."""
    logits = logits.double()

    def loss(log: Tensor) -> Tensor:
        return loss_of(log.exp() * logits, labels, weights) + log.square() / 2

    return minimum(loss, logits.new_zeros(()), max_iter=100).exp().item()


def loss_of(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """The cross-entropy (sum) of logits (n, C), with weights (n,) of the rows."""
    if weights is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    return weights.to(logits) @ F.cross_entropy(logits, labels, reduction="none")


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """features (n, E), labels (n,) -> class means (C, E) in float64; ZooError if a class has no features."""
    if missing := sorted(set(range(classes)).difference(labels.tolist())):
        listed = ", ".join(map(str, missing[:5]))
        raise ZooError(f"No training image has label {listed}: every class needs at least one. Add images or drop it.")
    return means_of_some(features, labels, classes)


def means_of_some(features: Tensor, labels: Tensor, classes: int, weights: Tensor | None = None) -> Tensor:
    """`class_means`, with weights (n,) of the features, which are 0 for a class without features."""
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    for rows, of in in_float64(features if weights is None else weights[:, None] * features, labels):
        sums.index_add_(0, of, rows)
    counts = torch.bincount(labels, weights, classes).double()
    return sums / counts.masked_fill(counts == 0, 1)[:, None]


def in_float64(features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of many rows at a time, with their labels."""
    for rows, of in zip(features.split(ROWS_AT_A_TIME), labels.split(ROWS_AT_A_TIME), strict=True):
        yield rows.double(), of
