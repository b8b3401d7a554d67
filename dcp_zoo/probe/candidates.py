"""Candidates: softmax regressions and Gaussian classes, each a linear function of the features. A text probe
is their weighted mean, see `stacking`.

Candidates of one `Configuration` read the same subset f (B, k) of the features' columns and start at the same
share s of the scaled text logits a z (B, C). For each of `PENALTIES` there is one softmax regression:

    logits = s a z + f D^T                                               (B, C)

D (C, k) minimises sum_i w_i cross-entropy_i + penalty / 2 |D|^2 over the training images and their mirror
images, among the classes that have images: one convex problem. The w_i give each class the same weight, see
`balanced`.

And for each of `STRENGTHS` t there are Gaussian classes with means m_c (C, k), whose mean is m:

    logits = s a z + t r (f (m_c - m)^T - (m_c - m) (m_c + m)^T / 2)     (B, C)

r        such that for t = 1 both terms have the same standard deviation over the training images

All are fitted to S training sets in one batch. Each set keeps some of the same n images, such as all but one
fold.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import WeightAndBias
from dcp_zoo.probe.estimates import minimum, text_scales, weighted_class_means
from dcp_zoo.probe.model import PENALTIES, nearest
from dcp_zoo.threads import fair_threads

TEXT_SHARES = (1.0, 0.5, 0.0)  # s, of the text logits that a candidate starts at
INTERMEDIATE_SHARES = (1.0, 0.0)  # s, if it reads intermediate features of an image tower
STRENGTHS = (0.25, 0.5, 1.0, 2.0)  # t, of Gaussian classes beside the text logits
LARGE = 2**16  # images, with their mirror images, times classes: of larger sets, all candidates start at s = 1
STEPS = 20  # of L-BFGS for each penalty, from the solution for the one before
FEWER_STEPS = 8  # for large sets, of which a step is expensive, and these are as accurate
TOLERANCE = 1e-3  # of its gradient
NEVER_PREDICTED = -1e4  # logit of a class without images in a training set; finite, as images left out may have it
SMALL = 2**25  # multiplications of a loss that a second thread makes no faster


class Configuration(NamedTuple):
    """What K candidates have in common: one for each of `PENALTIES`, then one for each of `STRENGTHS`."""

    subset: int  # which of `TrainingSet.column_subsets` they read
    text_share: float  # s


class ColumnSubset(NamedTuple):
    """Columns of the features that candidates read, and the training images in the coordinates of their
    principal axes. In these a step of L-BFGS can be scaled to the curvature of each, and few images need few
    coordinates."""

    columns: Tensor  # (k,), positions among all W
    axes: Tensor  # (k, r), times what scales these columns to the length 1
    rows: Tensor  # (V n, r), the training images
    squares: Tensor  # (r,), the sum of squares of each coordinate


@dataclass(frozen=True)
class TrainingSet:
    """Features of n training images of C classes, on the CPU."""

    views: Tensor  # (V, n, W), of the images, then of their mirror images: normalised groups, one after the other
    groups: Sequence[Tensor]  # the columns of each group that candidates read; the first is CLIP's embedding
    labels: Tensor  # (n,)
    text: WeightAndBias  # the text logits z as a linear function of the first group
    weights: Tensor  # (n,), how much each image counts
    intermediate: Sequence[int] = ()  # which of the groups are intermediate features of an image tower
    clip_groups: int | None = None  # how many of the first are CLIP's and final; default all, see `prior_weights`
    total: int | None = None  # how many images there are with those that are left out; default n

    def select(self, images: Tensor) -> "TrainingSet":
        """Some of the images, by a mask or positions."""
        return replace(self, views=self.views[:, images], labels=self.labels[images], weights=self.weights[images])

    @property
    def is_large(self) -> bool:
        """By all images, so that what is fitted without some of them is fitted by the same rule."""
        return len(self.views) * (self.total or len(self.labels)) * len(self.text[0]) > LARGE

    @cached_property
    def all(self) -> Tensor:
        """The one set (1, n) that keeps all images."""
        return torch.ones(1, len(self.labels), dtype=torch.bool)

    @cached_property
    def text_logits(self) -> Tensor:
        """z (n, C) of the images."""
        return F.linear(self.views[0][:, self.groups[0]], *self.text)

    def scales(self, kept: Tensor) -> Tensor:
        """a (S,), by the images that each set keeps (S, n)."""
        return text_scales(self.text_logits, self.labels, kept * self.weights)

    @cached_property
    def column_subsets(self) -> list[ColumnSubset]:
        """See `subsets_of`."""
        found = []
        for columns, scale in subsets_of(self.groups, self.intermediate):
            rows = scale * self.views.flatten(0, 1)[:, columns]
            axes, coordinates, squares = principal_axes(rows)
            found.append(ColumnSubset(columns, scale * axes, coordinates, squares))
        return found


def columns_of(widths: Sequence[int]) -> tuple[Tensor, ...]:
    """The columns of groups of features that lie one after the other."""
    return torch.arange(sum(widths)).split([*widths])


def principal_axes(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The principal axes (k, r) of rows (m, k), and the rows' coordinates (m, r) with their sums of squares
    (r,)."""
    left, lengths, right = torch.linalg.svd(rows, full_matrices=False)
    return right.T, left * lengths, lengths.square()


def subsets_of(groups: Sequence[Tensor], intermediate: Sequence[int]) -> list[tuple[Tensor, float]]:
    """The columns that candidates read, and what scales them to the length 1. Subset 0 has all groups of
    features that are not intermediate. Subset g > 0 belongs to group g, and other code counts on that: it is
    this group, if intermediate with the final one before it.

    >>> groups = columns_of([2, 1, 1, 1])
    >>> [(columns.tolist(), round(scale, 3)) for columns, scale in subsets_of(groups, intermediate=[2])]
    [([0, 1, 2, 4], 0.577), ([2], 1.0), ([2, 3], 0.707), ([4], 1.0)]
    """
    final = [group for group in range(len(groups)) if group not in intermediate]
    subsets = [final]
    for group in range(1, len(groups)):
        if group in intermediate:
            last_final = max(other for other in final if other < group)
            subsets.append([last_final, group])
        else:
            subsets.append([group])
    return [(torch.cat([groups[group] for group in subset]), len(subset) ** -0.5) for subset in subsets]


def configurations_of(images: TrainingSet) -> list[Configuration]:
    """The configurations that are worth fitting before anything is known of them."""
    found = []
    for subset in range(len(images.groups)):
        shares = INTERMEDIATE_SHARES if subset in images.intermediate else TEXT_SHARES
        found += [Configuration(subset, share) for share in shares if share == 1 or not images.is_large]
    return found


class Candidate(NamedTuple):
    """A share of the text logits, and a linear function of the features."""

    text_share: float
    weight: Tensor  # (C, W)
    bias: Tensor  # (C,)

    def logits(self, text_logits: Tensor, features: Tensor) -> Tensor:
        """Scaled text logits (m, C) and features (m, W) of the same images -> logits (m, C)."""
        return self.text_share * text_logits + F.linear(features, self.weight, self.bias)


CandidateWeights = Mapping[Configuration, Tensor]  # of the K candidates of each configuration


@dataclass(frozen=True)
class Fits:
    """The candidates of some configurations, fitted to S training sets. Methods are about the set `fit`, and
    images at m positions among all."""

    images: TrainingSet
    kept: Tensor  # (S, n), which images are in each set
    scales: Tensor  # (S,), a
    has_images: Tensor  # (S, C), which classes have images
    means: Tensor  # (S, C, W), of the classes over all views, 0 for a class without images
    linear: Mapping[Configuration, WeightAndBias]  # weights (S, K, C, r) of coordinates, and biases (S, K, C)

    def text_logits(self, fit: int, positions: Tensor) -> Tensor:
        """a z (m, C)."""
        return self.scales[fit] * self.images.text_logits[positions]

    def losses(self, fit: int, positions: Tensor) -> dict[Configuration, Tensor]:
        """The cross-entropy (weighted sum) of each candidate (K,)."""
        labels = self.images.labels[positions]
        text_logits = self.text_logits(fit, positions)[:, None]
        losses = {}
        for configuration, (weight, bias) in self.linear.items():
            rows = self.images.column_subsets[configuration.subset].rows[positions]
            added = torch.einsum("mr,kcr->mkc", rows, weight[fit]) + bias[fit]
            log_probabilities = (configuration.text_share * text_logits + added).log_softmax(2)
            correct = log_probabilities[torch.arange(len(labels)), :, labels]
            losses[configuration] = -self.images.weights[positions] @ correct
        return losses

    def mean(self, fit: int, weights: CandidateWeights) -> Candidate:
        """The sum of the candidates times their weights: one more linear function."""
        classes, width = self.means.shape[1:]
        text_share = 0.0
        mean_weight = torch.zeros(classes, width)
        mean_bias = torch.zeros(classes)
        for configuration, each in weights.items():
            weight, bias = self.linear[configuration]
            read = self.images.column_subsets[configuration.subset]
            text_share += configuration.text_share * each.sum().item()
            mean_weight[:, read.columns] += torch.tensordot(each, weight[fit], 1) @ read.axes.T
            mean_bias += each @ bias[fit]
        return Candidate(text_share, mean_weight, mean_bias)

    def logits(self, fit: int, weights: CandidateWeights, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (m, C) of the mean of the candidates, and the text logits that it starts at."""
        mean = self.mean(fit, weights)
        text_logits = self.text_logits(fit, positions)
        return mean.logits(text_logits, self.images.views[0, positions]), mean.text_share * text_logits

    def distances(self, fit: int, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """Distances (m,) to the nearest of these rows (k, ..) of the features that are used; default: of the
        means of the classes."""
        used = torch.cat([*self.images.groups])
        if rows is None:
            rows = self.means[fit, self.has_images[fit]][:, used]
        return nearest(self.images.views[0, positions][:, used], rows) / math.sqrt(len(self.images.groups))


def fit_candidates(
    images: TrainingSet, kept: Tensor, scales: Tensor, configurations: Collection[Configuration]
) -> Fits:
    """Fit the candidates of some configurations to the images that each of S sets keeps (S, n), with the
    scales a (S,).

    Two classes of one image, each with the text logits 1 and 0: with the penalty 1, softmax regression adds
    d = 0.2 to the right logit and takes it from the other. Its gradient is 0: d = 1 - p, for softmax(1.2,
    -0.2) has p = 0.8.

    >>> text = torch.eye(2), torch.zeros(2)
    >>> images = TrainingSet(torch.eye(2)[None], columns_of([2]), torch.tensor([0, 1]), text, torch.ones(2))
    >>> fits = fit_candidates(images, images.all, torch.ones(1), [Configuration(0, 1.0)])
    >>> regression = torch.eye(11)[1]
    >>> fits.mean(0, {Configuration(0, 1.0): regression}).weight.round(decimals=2)
    tensor([[ 0.2000, -0.2000],
            [-0.2000,  0.2000]])
    """
    views = len(images.views)
    classes = len(images.text[0])
    features = images.views.flatten(0, 1)
    labels = images.labels.repeat(views)
    rows_kept = kept.repeat(1, views)  # (S, V n)
    row_weights = rows_kept * images.weights.repeat(views)
    has_images = kept.float() @ F.one_hot(images.labels, classes).float() > 0  # (S, C)
    means = torch.stack([weighted_class_means(features, labels, classes, each).float() for each in row_weights])
    loss_weights = balanced(row_weights, labels, has_images) / views
    text_logits = F.linear(features[:, images.groups[0]], *images.text)  # (V n, C)
    linear = {}
    with fair_threads(1 if features.numel() * classes < SMALL else None):
        for subset, read in enumerate(images.column_subsets):
            own = [configuration for configuration in configurations if configuration.subset == subset]
            if not own:
                continue
            shares = torch.tensor([configuration.text_share for configuration in own])
            starts = (scales[:, None] * shares)[:, :, None, None] * text_logits.T  # (S, T, C, V n)
            starts = starts.masked_fill(~has_images[:, None, :, None], NEVER_PREDICTED)
            if images.is_large and not kept.all():
                regressions = regressions_by_set(read.rows, starts, labels, loss_weights, rows_kept)
            else:
                steps = FEWER_STEPS if images.is_large else STEPS
                regressions = softmax_regressions(read.rows, read.squares, starts, labels, loss_weights, steps)
            gaussians = []
            for fit, rows in enumerate(rows_kept):
                own_means = means[fit][:, read.columns] @ read.axes
                own_text = scales[fit] * text_logits[rows]
                gaussians.append(gaussian_classes(read.rows[rows], own_means, own_text, has_images[fit]))
            gaussian_weights = torch.stack([weight for weight, _ in gaussians])  # (S, `STRENGTHS`, C, r)
            gaussian_biases = torch.stack([bias for _, bias in gaussians])
            biases = F.pad(gaussian_biases, (0, 0, len(PENALTIES), 0))  # (S, K, C); regressions have none
            for i, configuration in enumerate(own):
                linear[configuration] = torch.cat([regressions[:, i], gaussian_weights], 1), biases
    return Fits(images, kept, scales, has_images, means, linear)


def balanced(weights: Tensor, labels: Tensor, has_images: Tensor) -> Tensor:
    """Weights (S, m) of rows, by labels (m,) and which classes have images (S, C), as in sum, but the same
    for all rows of each class together."""
    totals = torch.zeros(has_images.shape).index_add_(1, labels, weights).clamp(min=1e-6)
    for_each_class = weights.sum(1, keepdim=True) / has_images.sum(1, keepdim=True)
    return weights * (for_each_class / totals)[:, labels]


def gaussian_classes(rows: Tensor, means: Tensor, text_logits: Tensor, has_images: Tensor) -> WeightAndBias:
    """Gaussian classes of each strength for means (C, r), in units of the text logits (m, C) of the same
    rows (m, r): weights (`STRENGTHS`, C, r) and biases (`STRENGTHS`, C), 0 for a class without images."""
    middle = means[has_images].mean(0)
    weight = (means - middle).masked_fill(~has_images[:, None], 0)
    bias = -(weight * (means + middle)).sum(1) / 2
    text = text_logits[:, has_images]
    scores = (rows @ weight.T + bias)[:, has_images]
    text_deviation = (text - text.mean(1, keepdim=True)).std(correction=0)
    deviation = (scores - scores.mean(1, keepdim=True)).std(correction=0)
    strengths = torch.tensor(STRENGTHS) * text_deviation / deviation.clamp(min=1e-6)
    return strengths[:, None, None] * weight, strengths[:, None] * bias


def regressions_by_set(rows: Tensor, starts: Tensor, labels: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """`softmax_regressions` (S, T, `PENALTIES`, C, r) of one set after the other, from `starts` (S, T, C, m): on the
    rows that it keeps (S, m), in their own principal axes. Of large sets this is faster than a batch that
    has all rows in all sets.
    """
    found = []
    for own_starts, own_weights, own in zip(starts, weights, kept, strict=True):
        axes, coordinates, squares = principal_axes(rows[own])
        starts_of_set = own_starts[None, :, :, own]
        d = softmax_regressions(coordinates, squares, starts_of_set, labels[own], own_weights[None, own], FEWER_STEPS)
        found.append(d @ axes.T)
    return torch.cat(found)


def softmax_regressions(
    rows: Tensor, squares: Tensor, starts: Tensor, labels: Tensor, weights: Tensor, steps: int
) -> Tensor:
    """D (S, T, `PENALTIES`, C, r) of all problems at once: for rows (m, r) in principal axes,
    with their sums of squares (r,), from logits `starts` (S, T, C, m), with labels (m,) and weights (S, m) of
    the losses. Each penalty's solution is the start for the next one, and takes at most so many steps."""
    sets, shares, classes, _ = starts.shape
    batch = sets * shares
    starts = starts.flatten(0, 1)
    labels = labels.expand(batch, -1)
    weights = weights.repeat_interleave(shares, 0)
    solutions = [torch.zeros(batch, classes, len(squares))]  # for an infinite penalty
    for penalty in PENALTIES[1:]:
        last = solutions[-1]
        unit = (squares / classes + penalty).rsqrt()  # of coordinates: in it the loss is about equally curved

        def loss(scaled: Tensor, unit: Tensor = unit, penalty: float = penalty) -> Tensor:
            d = unit * scaled
            logits = starts + (d.flatten(0, 1) @ rows.T).view_as(starts)
            losses = F.cross_entropy(logits, labels, reduction="none")
            return (weights * losses).sum() + penalty / 2 * d.square().sum()

        solutions.append(unit * minimum(loss, last / unit, steps, TOLERANCE))
    return torch.stack(solutions, 1).unflatten(0, (sets, shares))
