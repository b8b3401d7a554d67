"""The text probe of a head: a linear classifier on its image features that starts at the method's own logits, usually
the text logits, and moves away from them only as far as the training images justify. This project's own.

With normalised image features f (B, E) and the method's logits z (B, C), it is the mean of several candidates. For each
of `PENALTIES`, softmax regression from the text:

    logits = a z + f M D^T                                               (B, C)

a        scale of the method's logits, see `dcp_zoo.training.fit_probe`
D (C, E) minimises sum_i w_i cross-entropy_i + penalty / 2 |D|^2 over the training images and their mirror images, among
         the classes that have images: one convex problem; w_i gives each of them the same weight
M (E, E) P^(1/4), with the precision P within classes, see `shared_precision`: where images of one class hardly differ,
         moving costs less. Scaled so that features about their mean keep their length.

And for each of `STRENGTHS` s, Gaussian classes with means m (C, E) and shared precision G = M^4, about the mean of m:

    logits = a z + s r (f G (m_c - m)^T - (m_c - m) G (m_c + m)^T / 2)   (B, C)

with r such that for s = 1 both parts are equally spread over the training images. None is chosen: each is weighted by
its evidence on images that were left out. A class without images is its text alone: the images of the others would only
push it away. A new class is fitted alone, by softmax regression against the mean features of the others.

A head whose method changed the image features reads both them and those of the frozen tower: f is [f_own, f_frozen] /
sqrt(2), z the mean of both logits, and the probe the mean of two, each fitted on its own features. New classes and
distances take the frozen tower's M.
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
STRENGTHS = (0.25, 0.5, 1.0, 2.0)  # of Gaussian classes beside the text logits
STEPS = 20  # of L-BFGS for each penalty, from the solution for the one before
ENOUGH, FEWER_STEPS = 10_000, 8  # of more training images a step is expensive, see `Candidates.solve`
SMALL = 2**25  # multiplications of a loss that a second thread makes no faster
NEVER = torch.finfo(torch.float16).min  # a threshold that rejects nothing, also in half precision
NO_SPREAD = 1e-10  # a scatter below this fraction of the rows' squared length is float32 rounding, not spread
ROWS_AT_A_TIME = 8192  # rows converted to float64 at a time
NO_THRESHOLD = (
    "This head has no threshold to reject images: it was fitted on too few, or for other texts than it has now. "
    "dcp-zoo fit-text-probe sets one, from at least two images of a class and 20 in all."
)
Linear = tuple[Tensor, Tensor]  # weight (C, E) and bias (C,) of logits


class TextProbe(nn.Module):
    """See the module. `weight` (C, E) and `bias` (C,) are added to the scaled logits, in the order of `names`, the
    classes that it was fitted on; `text_scale` is a. New classes need the mean features `means` (C, E), `metric`, M (E,
    E), and `evidence`, the weights of `PENALTIES`, which sum to 1.

    Images with an `in_distribution_score` below `threshold` belong to none of the classes. Its distance is that of the
    frozen tower's features to the nearest of the class means, in the metric M^2, in units of `spread`, the mean of
    training images that were left out. Classes can be added, renamed and removed; other texts unset the threshold.

    Args:
        names: of the classes.
        width: E of each reading.
        readings: 2 if the features are the method's own and the frozen tower's."""

    weight: Tensor
    bias: Tensor
    text_scale: Tensor
    means: Tensor
    metric: Tensor
    evidence: Tensor
    threshold: Tensor
    spread: Tensor

    def __init__(self, names: Sequence[str], width: int, readings: int = 1) -> None:
        super().__init__()
        self.names, self.width, self.readings = list(names), width, readings
        for name in ("weight", "means"):
            self.register_buffer(name, torch.zeros(len(names), width * readings))
        self.register_buffer("bias", torch.zeros(len(names)))
        self.register_buffer("metric", torch.zeros(width, width))
        self.register_buffer("evidence", torch.zeros(len(PENALTIES)))
        for name, value in {"text_scale": 1.0, "threshold": NEVER, "spread": 1.0}.items():
            self.register_buffer(name, torch.tensor(value))

    def _ordered(self, rows: Tensor, classes: Sequence[str]) -> Tensor:
        """Rows (C, ...) of its classes in the order of `classes`; 0 for those of which it saw no image."""
        if classes == self.names:  # the usual case, asked in every forward
            return rows
        index = {name: i for i, name in enumerate(self.names)}
        return torch.cat([rows, torch.zeros_like(rows[:1])])[[index.get(name, len(index)) for name in classes]]

    def forward(self, logits: Tensor, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Text logits (B, C) and features (B, E) of the same images -> logits (B, C) for these C classes."""
        weight, bias = self._ordered(self.weight, classes), self._ordered(self.bias, classes)
        return self.text_scale * logits + F.linear(features, weight, bias).to(logits.dtype)

    def linear(self, text: Linear, classes: Sequence[str]) -> Linear:
        """The logits for these C classes as a linear function of the features; `text` is that of the text logits."""
        weight, bias = text
        own = self._ordered(self.weight, classes), self._ordered(self.bias, classes)
        return self.text_scale * weight + own[0], self.text_scale * bias + own[1]

    def measure(self, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What `distance` needs: whitening (E, E), and the class means (C', E) in its space, of those with images."""
        metric = self.metric.float()
        whitening = metric @ metric / self.spread.float()
        means = self._ordered(self.means, classes)[:, -self.width :].float()
        return whitening, means[means.any(1)] @ whitening * math.sqrt(self.readings)

    def distance(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        """How far images are from what the head has seen: features (B, F) -> (B,), about 1 for images like these."""
        return nearest(features[:, -self.width :] * math.sqrt(self.readings), *self.measure(classes))

    @property
    def rejects(self) -> bool:
        """Whether there is a threshold."""
        return self.threshold.item() > NEVER

    def cannot_reject(self, classes: Sequence[str]) -> str:
        """Why images cannot be rejected among these classes, and what to do; "" if they can."""
        if not self.rejects:
            return NO_THRESHOLD
        seen = {name for name, mean in zip(self.names, self.means, strict=True) if mean.any()}
        if not (new := [name for name in dict.fromkeys(classes) if name not in seen]):
            return ""
        return (
            f"This head has seen no image of {', '.join(new[:5])}, and cannot tell what is none of the classes: load "
            "it with its own class names (omit --classes), or add these classes by their images (dcp-zoo classes add)."
        )

    def tensors(self, classes: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds, with the rows of `classes`, default its own; no threshold for others than these."""
        classes = self.names if classes is None else classes
        state = self.state_dict()
        state |= {name: self._ordered(state[name], classes) for name in ("weight", "bias", "means")}
        if self.cannot_reject(classes):
            state["threshold"] = torch.full_like(self.threshold, NEVER)
        return {f"{PREFIX}{name}": t for name, t in state.items()}

    def add(self, name: str, mean: Tensor, images: int, classes: Sequence[str], text: Linear) -> None:
        """Add a class, or replace the one of this name, from the mean feature (E,) of so many images of it, fitted
        against `classes`, among which it is, each by its mean. `text` is the linear function of their own logits."""
        self.remove(name)
        self.names = [*self.names, name]
        self.weight = torch.cat([self.weight, torch.zeros_like(self.weight[:1])])
        self.bias = torch.cat([self.bias, torch.zeros_like(self.bias[:1])])
        self.means = torch.cat([self.means, mean.to(self.means)[None]])
        own = list(classes).index(name)
        weight, bias = (t.cpu() for t in self.linear(text, classes))
        metric, means = self.metric.cpu(), self._ordered(self.means, classes).cpu()
        x, start, labels = self._moved(means, metric), F.linear(means, weight, bias), torch.arange(len(means))
        column = F.one_hot(torch.tensor(own), len(means)).to(x)
        row = d = torch.zeros_like(x[0])
        for penalty, evidence in zip(PENALTIES, self.evidence.tolist(), strict=True):

            def loss(d: Tensor, penalty: float = penalty) -> Tensor:
                logits = start + torch.outer(x @ d, column)
                return images * F.cross_entropy(logits, labels, reduction="sum") + penalty / 2 * d.square().sum()

            if not math.isinf(penalty):
                d = minimum(loss, d, max_iter=2 * STEPS, tolerance_grad=1e-4)
            row = row + evidence * self._moved(d[None], metric)[0]
        self.weight[-1] = row.to(self.weight)

    def _moved(self, rows: Tensor, metric: Tensor) -> Tensor:
        """Rows (n, F) times M, each reading's part."""
        return (rows.unflatten(1, (self.readings, self.width)) @ metric).flatten(1)

    def remove(self, name: str) -> None:
        """Forget a class, if it is known."""
        if name not in self.names:
            return
        keep = [i for i, known in enumerate(self.names) if known != name]
        self.names = [self.names[i] for i in keep]
        self.weight, self.bias, self.means = self.weight[keep], self.bias[keep], self.means[keep]


def nearest(features: Tensor, whitening: Tensor, means: Tensor) -> Tensor:
    """The distance (B,) of features (B, E) to the nearest mean, see `TextProbe.measure`."""
    x = features.float() @ whitening
    squared = x.square().sum(1, keepdim=True) - 2 * x @ means.T + means.square().sum(1)
    return squared.amin(1).clamp(min=0).sqrt()


def to_nearest_mean(features: Tensor, metric: Tensor, means: Tensor) -> Tensor:
    """The distance (B,) of features (B, E) to the nearest of the class means (C, E), for M (E, E)."""
    whitening = torch.linalg.matrix_power(metric, 2)
    return nearest(features, whitening, means @ whitening)


class Candidates:
    """What a text probe is the mean of, fitted on normalised features (V, n, E) of training images and their labels
    (n,), from the scaled text logits a z as a linear function of the features; all on the CPU. `weights` (n,) multiply
    the losses of the images, whose sum stays as it is."""

    def __init__(self, views: Tensor, labels: Tensor, text: Linear, weights: Tensor | None = None) -> None:
        rows, self.text = views.flatten(0, 1), text
        self.labels = labels.repeat(len(views))
        self.metric = half_whitening(rows, self.labels)
        counts = torch.bincount(labels, minlength=len(text[0]))
        self.present, self.means = counts > 0, means_of_some(rows, self.labels, len(counts)).float()
        self.x, self.start = rows @ self.metric, F.linear(rows, *text).masked_fill(~self.present, -math.inf)
        self.weights = (len(labels) / (self.present.sum() * len(views) * counts))[self.labels]
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
    def regressions(self) -> Tensor:
        """D M^T for each of `PENALTIES`, (K, C, E)."""
        d, rows = torch.zeros(self.text[0].shape), []
        is_small = self.x.numel() * len(d) < SMALL
        with fair_threads(1 if is_small else None):
            for penalty in PENALTIES:
                d = self.solve(penalty, d)
                rows.append(d @ self.metric.T)
        return torch.stack(rows)

    @cached_property
    def gaussian(self) -> Linear:
        """The scores of Gaussian classes, as spread as the text logits: weight (C, E) and bias (C,)."""
        middle = self.means[self.present].mean(0)
        weight = (self.means - middle) @ torch.linalg.matrix_power(self.metric, 4) * self.present[:, None]
        bias = -(weight * (self.means + middle)).sum(1) / 2
        scores = self.x @ torch.linalg.matrix_power(self.metric, 3) @ (self.means - middle).T + bias
        text, own = (z[:, self.present] - z[:, self.present].mean(1, keepdim=True) for z in (self.start, scores))
        strength = text.std() / own.std().clamp(min=1e-6)
        return strength * weight, strength * bias

    @cached_property
    def added(self) -> Linear:
        """What each candidate adds to the text logits, as a linear function: weights (K, C, E) and biases (K, C)."""
        weight, bias = self.gaussian
        strengths, flat = torch.tensor(STRENGTHS), torch.zeros(len(PENALTIES), len(bias))
        return (
            torch.cat([self.regressions, strengths[:, None, None] * weight]),
            torch.cat([flat, strengths[:, None] * bias]),
        )

    def logits(self, features: Tensor) -> Tensor:
        """Features (m, E) -> the logits (K, m, C) of each candidate."""
        weight, bias = self.added
        return F.linear(features, *self.text) + features @ weight.mT + bias[:, None]

    def mean(self, weights: Tensor) -> Linear:
        """What the probe adds to the text logits, by weights (K,) of the candidates: weight (C, E) and bias (C,)."""
        weight, bias = self.added
        return (weights[:, None, None] * weight).sum(0), weights @ bias


def join(linears: Sequence[Linear]) -> Linear:
    """The mean of linear functions of an image's features f_1 .. f_n, as one of [f_1, .., f_n] / sqrt(n)."""
    weights, biases = zip(*linears, strict=True)
    return torch.cat(weights, 1) / math.sqrt(len(weights)), torch.stack(biases).mean(0)


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
