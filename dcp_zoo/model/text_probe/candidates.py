"""What a text probe is the mean of."""

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.clip import Linear
from dcp_zoo.model.text_probe.estimates import half_whitening, means_of_some, minimum
from dcp_zoo.model.text_probe.probe import PENALTIES, STEPS
from dcp_zoo.threads import fair_threads

STRENGTHS = (0.25, 0.5, 1.0, 2.0)  # of Gaussian classes beside the text logits
ENOUGH, FEWER_STEPS = 10_000, 8  # of more training images a step is expensive, see `Candidates.solve`
SMALL = 2**25  # multiplications of a loss that a second thread makes no faster


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
