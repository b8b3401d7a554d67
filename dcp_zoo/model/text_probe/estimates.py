"""What classifiers on features share: class means, the precision within classes, where a convex loss is lowest.

Features (n, E) and labels (n,), computed on the CPU.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values

NO_SPREAD = 1e-10  # a scatter below this fraction of the rows' squared length is float32 rounding, not spread
ROWS_AT_A_TIME = 8192  # rows converted to float64 at a time
Slope = Callable[[Tensor], tuple[Tensor, Tensor]]  # of a loss: its value and gradient at a place


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor, max_iter: int, tolerance_grad: float = 1e-7) -> Tensor:
    """Where a convex loss is lowest, by torch's L-BFGS with a line search from `start`."""

    def slope(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            value = loss(x.requires_grad_())
        return value.detach(), torch.autograd.grad(value, x)[0]

    return lowest_point(slope, start, max_iter, tolerance_grad)


def lowest_point(slope: Slope, start: Tensor, max_iter: int, tolerance_grad: float = 1e-7) -> Tensor:
    """`minimum`, of a loss whose value and gradient are given."""
    found = start.clone().requires_grad_()
    options: Values = {"max_iter": max_iter, "tolerance_grad": tolerance_grad, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([found], **options)

    @torch.no_grad()
    def closure() -> Tensor:
        value, found.grad = slope(found.detach())
        return value

    optimizer.step(closure)
    return found.detach()


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """features (n, E), labels (n,) -> class means (C, E) in float64; ZooError if a class has no features."""
    if missing := sorted(set(range(classes)).difference(labels.tolist())):
        listed = ", ".join(map(str, missing[:5]))
        raise ZooError(f"No training image has label {listed}: every class needs at least one. Add images or drop it.")
    return means_of_some(features, labels, classes)


def means_of_some(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`class_means`, which are 0 for a class without features."""
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    for rows, of in _in_float64(features, labels):
        sums.index_add_(0, of, rows)
    return sums / torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]


def shared_precision(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """P = E pinv((n - 1) S + tr(S) I) in float64, with the covariance S (E, E) of features (n, E) around the class
    means, as in GDA (Wang et al., ICLR 2024). The shrinkage bounds the condition number by n. With S = 0, as with one
    row per class, P would be 0: an isotropic covariance with the variance of the class means takes the place of S."""
    n, width = features.shape
    scatter, length = torch.zeros(width, width, dtype=torch.float64), 0.0  # (n - 1) S
    for rows, of in _in_float64(features, labels):
        centred = rows - means[of]
        scatter += centred.T @ centred
        length += rows.square().sum().item()
    if scatter.trace() <= NO_SPREAD * length:
        variance = (means - means.mean(0)).square().sum() / max(len(means) - 1, 1)
        scatter = (n - 1) * variance / width * torch.eye(width, dtype=torch.float64)
    shrinkage = scatter.trace() / max(n - 1, 1) * torch.eye(width, dtype=torch.float64)
    precision = width * torch.linalg.pinv(scatter + shrinkage, hermitian=True)
    return (precision + precision.T) / 2


def _in_float64(features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, of in zip(features.split(ROWS_AT_A_TIME), labels.split(ROWS_AT_A_TIME), strict=True):
        yield rows.double(), of
