"""What a text probe is the mean of."""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.clip import Linear
from dcp_zoo.model.text_probe.estimates import Slope, lowest_point, means_of_some
from dcp_zoo.model.text_probe.probe import PENALTIES, STEPS, nearest
from dcp_zoo.threads import fair_threads

TEXTS = (1.0, 0.5, 0.0)  # how much of the text logits a candidate starts at
STRENGTHS = (0.25, 0.5, 1.0, 2.0)  # of Gaussian classes beside the text logits
GROUP = len(PENALTIES) + len(STRENGTHS)  # candidates of a block of columns and a strength of the text
LARGE = 2**16  # images, with their mirror images, times classes: more start at the full text alone
ENOUGH, FEWER_STEPS = 2_000, 8  # of more training images a step is expensive, see `lowest`
SMALL = 2**25  # multiplications of a loss that a second thread makes no faster


Axes = tuple[Tensor, Tensor] | None  # eigenvalues (E',) and eigenvectors (E', E') of X^T X, of many images
Group = tuple[int, float]  # of candidates: the number of a block of columns, and the strength of the text


class Candidate(NamedTuple):
    """Logits: this much of the text logits, and a linear function of some columns of the features."""

    text: float
    columns: slice
    weight: Tensor  # (C, columns)
    bias: Tensor  # (C,)


class Candidates:
    """The candidates, fitted on features (V, n, W) of training images, normalised parts of these widths one after the
    other, and their labels (n,), from the scaled text logits a z as a linear function of the first part; all on the
    CPU. `weights` (n,) multiply the losses of the images, whose sum stays as it is. Only candidates of these `groups`
    are fitted; default: `all_groups`."""

    def __init__(
        self,
        views: Tensor,
        widths: Sequence[int],
        labels: Tensor,
        text: Linear,
        weights: Tensor | None = None,
        groups: Sequence[Group] | None = None,
    ) -> None:
        self.groups = all_groups(widths) if groups is None else groups
        self.rows, self.widths, self.text = views.flatten(0, 1), widths, text
        self.labels = labels.repeat(len(views))
        counts = torch.bincount(labels, minlength=len(text[0]))
        self.present, self.means = counts > 0, means_of_some(self.rows, self.labels, len(counts)).float()
        self.start = F.linear(self.rows[:, : widths[0]], *text)
        self.weights = (len(labels) / (self.present.sum() * len(views) * counts))[self.labels]
        if weights is not None:
            weighted = self.weights * weights.repeat(len(views))
            self.weights = weighted * (self.weights.sum() / weighted.sum())

    @property
    def blocks(self) -> list[tuple[slice, float]]:
        """The columns that candidates read, and their scale to the length 1: all parts, and each but CLIP's embedding
        alone."""
        every = slice(0, self.rows.shape[1]), len(self.widths) ** -0.5
        alone = [(slice(*ends), 1.0) for ends in pairwise(accumulate(self.widths))]
        return [every, *alone]

    @cached_property
    def all(self) -> list[Candidate]:
        """For each group one for each of `PENALTIES`, and one for each of `STRENGTHS`."""
        with fair_threads(1 if self.rows.numel() * len(self.present) < SMALL else None):
            return [each for number in range(len(self.blocks)) for each in self._of_block(number)]

    def of(self, groups: Sequence[Group]) -> "Candidates":
        """Those of some of the groups, which have been fitted."""
        some = copy.copy(self)
        some.groups = groups
        some.all = [c for i, c in enumerate(self.all) if self.groups[i // GROUP] in groups]
        return some

    def _of_block(self, number: int) -> Iterator[Candidate]:
        texts = [text for block, text in self.groups if block == number]
        if not texts:
            return
        columns, scale = self.blocks[number]
        rows = scale * self.rows[:, columns]
        weight, bias = self._gaussian(rows, scale * self.means[:, columns])
        few = len(rows) < rows.shape[1]  # then D is in the span of the rows, which has fewer dimensions
        span = torch.linalg.qr(rows.T)[0] if few else None
        x = rows if span is None else rows @ span
        axes = eigenvectors(x.T @ x) if len(x) > ENOUGH else None
        for text in texts:
            for d in self._regressions(x, axes, text):
                yield Candidate(text, columns, scale * (d if span is None else d @ span.T), torch.zeros_like(bias))
            for strength in STRENGTHS:
                yield Candidate(text, columns, scale * strength * weight, strength * bias)

    def _regressions(self, x: Tensor, axes: Axes, text: float) -> Iterator[Tensor]:
        """D (C, E') for each of `PENALTIES`, each from the one before; `axes` as of `lowest`."""
        start = (text * self.start).masked_fill(~self.present, -math.inf)
        d, images = torch.zeros(len(self.present), x.shape[1]), torch.arange(len(x))
        for penalty in PENALTIES:

            def slope(d: Tensor, penalty: float = penalty) -> tuple[Tensor, Tensor]:
                log_p = F.log_softmax(start + x @ d.T, -1)
                value = -(self.weights * log_p[images, self.labels]).sum() + penalty / 2 * d.square().sum()
                errors = log_p.exp()
                errors[images, self.labels] -= 1
                return value, (self.weights[:, None] * errors).T @ x + penalty * d

            d = torch.zeros_like(d) if math.isinf(penalty) else lowest(slope, penalty, d, axes)
            yield d

    def _gaussian(self, rows: Tensor, means: Tensor) -> Linear:
        """The scores of Gaussian classes, as spread as the text logits: weight (C, E') and bias (C,)."""
        middle = means[self.present].mean(0)
        weight = (means - middle) * self.present[:, None]
        bias = -(weight * (means + middle)).sum(1) / 2
        scores = rows @ weight.T + bias
        text, own = (z[:, self.present] - z[:, self.present].mean(1, keepdim=True) for z in (self.start, scores))
        strength = text.std() / own.std().clamp(min=1e-6)
        return strength * weight, strength * bias

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy (sum) of each candidate (K,) on other images: features (m, W), labels (m,)."""
        text = F.linear(features[:, : self.widths[0]], *self.text)
        logits = (each.text * text + F.linear(features[:, each.columns], each.weight, each.bias) for each in self.all)
        return torch.stack([F.cross_entropy(z, labels, reduction="sum") for z in logits])

    def distances(self, features: Tensor) -> Tensor:
        """Distances (m,) of other images (m, W) to the nearest class mean."""
        return self.to_nearest(features, self.means[self.present])

    def to_nearest(self, features: Tensor, rows: Tensor) -> Tensor:
        """Distances (m,) of images (m, W) to the nearest of these rows (k, W), of parts that are joined."""
        return nearest(features, rows) / math.sqrt(len(self.widths))

    def mean(self, evidence: Tensor) -> tuple[float, Linear]:
        """The mean of the candidates by weights (K,): the strength of the text, and weight (C, W) and bias (C,)."""
        text, weight, bias = 0.0, torch.zeros_like(self.means), torch.zeros(len(self.means))
        for share, each in zip(evidence.tolist(), self.all, strict=True):
            text += share * each.text
            weight[:, each.columns] += share * each.weight
            bias += share * each.bias
        return text, (weight, bias)

    def logits(self, features: Tensor, evidence: Tensor) -> Tensor:
        """Features (m, W) -> the logits (m, C) of the mean of the candidates."""
        text, added = self.mean(evidence)
        return text * F.linear(features[:, : self.widths[0]], *self.text) + F.linear(features, *added)


def all_groups(widths: Sequence[int]) -> list[Group]:
    """Every block of columns at every strength of the text."""
    return [(block, text) for block in range(len(widths)) for text in TEXTS]


def eigenvectors(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (E,) and eigenvectors (E, E) of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(square.double())
    return values.clamp(min=0).float(), vectors.float()


def lowest(slope: Slope, penalty: float, d: Tensor, axes: Axes) -> Tensor:
    """Where a loss is lowest whose value and gradient `slope` returns, by L-BFGS from D (C, E). With the `eigenvectors`
    of X^T X, for a loss of so many images that a step is expensive, in coordinates in which it is about equally curved,
    X^T X / C + penalty, so that fewer steps come as close."""
    if axes is None:
        return lowest_point(slope, d, max_iter=STEPS, tolerance_grad=1e-3)
    values, vectors = axes
    scale = (values / len(d) + penalty).rsqrt()
    back = (vectors * scale).T

    def curved(u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = slope(u @ back)
        return value, gradient @ back.T

    return lowest_point(curved, d @ vectors / scale, max_iter=FEWER_STEPS) @ back
