"""The text probe of a head: softmax regression on its image features that starts at the method's own logits, usually
the text logits, and leaves them only as far as the training images ask. This project's own.

With normalised image features f (B, E) and the method's logits z (B, C):

    logits = a z + f M D^T                                               (B, C)

a        scale of the method's logits, see `dcp_zoo.training.fit_probe`
D (C, E) minimises sum_i w_i cross-entropy_i + penalty / 2 |D|^2 over the training images and their mirror images, among
         the classes that have images: one convex problem; w_i gives each of them the same weight
M (E, E) P^(1/4), with the precision P within classes, see `shared_precision`: where images of one class hardly differ,
         moving costs less. Scaled so that features about their mean keep their length.

No penalty is chosen: the probe is the mean of the solutions for several, each weighted by its evidence on images that
were left out. A class without images is its text: its row of D is 0. If it took part, the images of the others would
only push it away. A new class is fitted alone, against the mean features of the others.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.threads import fair_threads

PREFIX = "text_probe."  # of its tensors in a head
PENALTIES = (math.inf, 1.0, 0.1, 0.03, 0.01, 0.003, 0.001)  # an infinite one leaves the text alone
STEPS = 20  # of L-BFGS for each penalty, from the solution for the one before
ENOUGH, FEWER_STEPS = 10_000, 8  # of more training images a step is expensive, see `Problem.solve`
SMALL = 2**25  # multiplications of a loss that a second thread makes no faster
NEVER = torch.finfo(torch.float16).min  # a threshold that rejects nothing, also in half precision
NO_SPREAD = 1e-10  # a scatter below this fraction of the rows' squared length is float32 rounding, not spread
ROWS_AT_A_TIME = 8192  # rows converted to float64 at a time
NO_THRESHOLD = (
    "This head has no threshold to reject images: it was fitted on too few, or for other classes or texts than it has "
    "now. dcp-zoo fit-text-probe sets one, from images of all its classes, at least two of each and 20 in all."
)
Linear = tuple[Tensor, Tensor]  # weight (C, E) and bias (C,) of logits


class TextProbe(nn.Module):
    """See the module. `weight` (C, E) is D M^T in the order of `names`, the classes that it was fitted on, and
    `text_scale` a. New classes need the mean features `means` (C, E), `metric`, M (E, E), and `evidence`, the weights
    of `PENALTIES`. Images with an `in_distribution_score` below `threshold` belong to none of the classes. It holds for
    exactly these classes and their texts: whatever changes them unsets it."""

    weight: Tensor
    text_scale: Tensor
    means: Tensor
    metric: Tensor
    evidence: Tensor
    threshold: Tensor

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.names = list(names)
        for name in ("weight", "means"):
            self.register_buffer(name, torch.zeros(len(names), width))
        self.register_buffer("metric", torch.zeros(width, width))
        self.register_buffer("evidence", torch.zeros(len(PENALTIES)))
        for name, value in {"text_scale": 1.0, "threshold": NEVER}.items():
            self.register_buffer(name, torch.tensor(value))

    def _ordered(self, rows: Tensor, classes: Sequence[str]) -> Tensor:
        """Rows (C, E) of its classes in the order of `classes`; 0 for those of which it saw no image."""
        if classes == self.names:  # the usual case, asked in every forward
            return rows
        index = {name: i for i, name in enumerate(self.names)}
        return F.pad(rows, (0, 0, 0, 1))[[index.get(name, len(index)) for name in classes]]

    def forward(self, logits: Tensor, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Text logits (B, C) and features (B, E) of the same images -> logits (B, C) for these C classes."""
        return self.text_scale * logits + (features @ self._ordered(self.weight, classes).T).to(logits.dtype)

    def linear(self, text: Linear, classes: Sequence[str]) -> Linear:
        """The logits for these C classes as a linear function of the features; `text` is that of the text logits."""
        weight, bias = text
        return self.text_scale * weight + self._ordered(self.weight, classes), self.text_scale * bias

    def unset_threshold(self) -> None:
        """From now on images cannot be rejected, until a threshold is fitted again."""
        self.threshold = torch.full_like(self.threshold, NEVER)

    @property
    def rejects(self) -> bool:
        """Whether there is a threshold."""
        return self.threshold.item() > NEVER

    def cannot_reject(self, classes: Sequence[str]) -> str:
        """Why images cannot be rejected among these classes, and what to do; "" if they can."""
        if not self.rejects:
            return NO_THRESHOLD
        if sorted(classes) == sorted(self.names):  # in any order; some datasets have two classes of one name
            return ""
        return (
            f"The threshold to reject images holds for exactly the {len(self.names)} classes it was fitted for, not "
            f"for these {len(classes)}. Load the head with its own class names (omit --classes), or save it with these "
            "(model.save_pretrained) and fit a threshold for them: dcp-zoo fit-text-probe, with images of each."
        )

    def tensors(self, classes: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds, with the rows of `classes`, default its own; no threshold for others than these."""
        classes = self.names if classes is None else classes
        state = self.state_dict()
        state |= {name: self._ordered(state[name], classes) for name in ("weight", "means")}
        if self.cannot_reject(classes):
            state["threshold"] = torch.full_like(self.threshold, NEVER)
        return {f"{PREFIX}{name}": t for name, t in state.items()}

    def add(self, name: str, mean: Tensor, images: int, classes: Sequence[str], text: Linear) -> None:
        """Add a class, or replace the one of this name, from the mean feature (E,) of so many images of it, fitted
        against `classes`, among which it is, each by its mean. `text` is the linear function of their own logits."""
        self.remove(name)
        self.names = [*self.names, name]
        self.weight = torch.cat([self.weight, torch.zeros_like(self.weight[:1])])
        self.means = torch.cat([self.means, mean.to(self.means)[None]])
        own = list(classes).index(name)
        weight, bias = (t.cpu() for t in self.linear(text, classes))
        metric, means = self.metric.cpu(), self._ordered(self.means, classes).cpu()
        x, start, labels = means @ metric, F.linear(means, weight, bias), torch.arange(len(means))
        column = F.one_hot(torch.tensor(own), len(means)).to(x)
        row = d = torch.zeros_like(x[0])
        for penalty, evidence in zip(PENALTIES, self.evidence.tolist(), strict=True):

            def loss(d: Tensor, penalty: float = penalty) -> Tensor:
                logits = start + torch.outer(x @ d, column)
                return images * F.cross_entropy(logits, labels, reduction="sum") + penalty / 2 * d.square().sum()

            if not math.isinf(penalty):
                d = minimum(loss, d, max_iter=2 * STEPS, tolerance_grad=1e-4)
            row = row + evidence * (metric @ d)
        self.weight[-1] = row.to(self.weight)
        self.unset_threshold()

    def remove(self, name: str) -> None:
        """Forget a class, if it is known."""
        if name not in self.names:
            return
        self.unset_threshold()
        keep = [i for i, known in enumerate(self.names) if known != name]
        self.names = [self.names[i] for i in keep]
        self.weight, self.means = self.weight[keep], self.means[keep]


class Problem:
    """The convex problem for D, on normalised features (V, n, E) of training images, their labels (n,), and the scaled
    text logits a z as a linear function of the features; all on the CPU. `weights` (n,) multiply the losses of the
    images, whose sum stays as it is."""

    def __init__(self, views: Tensor, labels: Tensor, text: Linear, weights: Tensor | None = None) -> None:
        rows, self.text = views.flatten(0, 1), text
        self.labels = labels.repeat(len(views))
        self.metric = half_whitening(rows, self.labels)
        counts = torch.bincount(labels, minlength=len(text[0]))
        self.x, self.start = rows @ self.metric, F.linear(rows, *text).masked_fill(counts == 0, -math.inf)
        self.weights = (len(labels) / ((counts > 0).sum() * len(views) * counts))[self.labels]
        if weights is not None:
            weighted = self.weights * weights.repeat(len(views))
            self.weights = weighted * (self.weights.sum() / weighted.sum())

    def loss(self, d: Tensor, penalty: float) -> Tensor:
        """What D (C, E) minimises."""
        losses = F.cross_entropy(self.start + self.x @ d.T, self.labels, reduction="none")
        return (self.weights * losses).sum() + penalty / 2 * d.square().sum()

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (E,) and eigenvectors (E, E) of X^T X."""
        values, vectors = torch.linalg.eigh((self.x.T @ self.x).double())
        return values.clamp(min=0).float(), vectors.float()

    def solve(self, penalty: float, start: Tensor) -> Tensor:
        """D (C, E) for this penalty, by L-BFGS from another D. For more than `ENOUGH` images, in coordinates in which
        the loss is about equally curved, X^T X / C + penalty, so that fewer steps come as close."""
        if math.isinf(penalty):
            return torch.zeros_like(start)
        if len(self.labels) <= ENOUGH:
            return minimum(lambda d: self.loss(d, penalty), start, max_iter=STEPS, tolerance_grad=1e-3)
        values, vectors = self.axes
        scale = (values / len(start) + penalty).rsqrt()
        back = (vectors * scale).T
        first = start @ vectors / scale
        return minimum(lambda u: self.loss(u @ back, penalty), first, max_iter=FEWER_STEPS) @ back

    @cached_property
    def solutions(self) -> Tensor:
        """D M^T for each of `PENALTIES`, (K, C, E)."""
        d, rows = torch.zeros(self.text[0].shape), []
        is_small = self.x.numel() * len(d) < SMALL
        with fair_threads(1 if is_small else None):
            for penalty in PENALTIES:
                d = self.solve(penalty, d)
                rows.append(d @ self.metric.T)
        return torch.stack(rows)


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor, **options: Any) -> Tensor:
    """Where a convex loss is lowest, by torch's L-BFGS with these `options` and a line search from `start`."""
    found = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([found], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(found)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return found.detach()


def half_whitening(rows: Tensor, labels: Tensor) -> Tensor:
    """M (E, E), symmetric to the last bit: features (n, E), labels (n,)."""
    present, index = labels.unique(return_inverse=True)
    means = class_means(rows, index, len(present))
    if len(rows) < rows.shape[1]:
        m = _of_few(rows.double() - means[index], rows.square().sum().item()).float()
    else:
        values, vectors = torch.linalg.eigh(shared_precision(rows, index, means))
        m = ((vectors * values.clamp(min=0) ** 0.25) @ vectors.T).float()
    centred = rows - rows.mean(0)
    length = (centred @ m).norm()
    return (m + m.T) * (centred.norm() / length / 2) if length > 0 else torch.eye(rows.shape[1])


def _of_few(centred: Tensor, length: float) -> Tensor:
    """P^(1/4) up to a factor, for fewer rows (n, E) than dimensions: only their span differs from the shrinkage."""
    spread, eye = centred.square().sum(), torch.eye(centred.shape[1], dtype=centred.dtype)
    if spread <= NO_SPREAD * length:
        return eye
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    kept = values > NO_SPREAD * spread
    span = centred.T @ (vectors[:, kept] / values[kept].sqrt())
    return eye + (span * ((1 + values[kept] * (len(centred) - 1) / spread) ** -0.25 - 1)) @ span.T


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """features (n, E), labels (n,) -> class means (C, E) in float64; ZooError if a class has no features."""
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        missing = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()[:5]))
        raise ZooError(f"No training image has label {missing}: every class needs at least one. Add images or drop it.")
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    for rows, of in _in_float64(features, labels):
        sums.index_add_(0, of, rows)
    return sums / counts[:, None]


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


def upper_triangle(square: Tensor) -> Tensor:
    """A symmetric matrix (E, E) as a checkpoint holds it, (E (E + 1) / 2,)."""
    return square[tuple(torch.triu_indices(*square.shape))]


def from_upper_triangle(values: Tensor) -> Tensor:
    """The matrix of `upper_triangle`; anything else as it is."""
    width = math.isqrt(8 * values.numel() + 1) // 2
    if values.ndim != 1 or width * (width + 1) != 2 * values.numel():
        return values
    square, (rows, columns) = values.new_empty(width, width), torch.triu_indices(width, width)
    square[rows, columns] = square[columns, rows] = values
    return square


def _in_float64(features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, of in zip(features.split(ROWS_AT_A_TIME), labels.split(ROWS_AT_A_TIME), strict=True):
        yield rows.double(), of
