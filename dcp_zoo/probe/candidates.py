"""Candidates: softmax regressions and Gaussian classes, each a linear function. A text probe is their mean."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import Linear
from dcp_zoo.probe.estimates import Slope, lowest_point, means_of_some
from dcp_zoo.probe.model import PENALTIES, STEPS
from dcp_zoo.threads import fair_threads

TEXTS = (1.0, 0.5, 0.0)  # how much of the text logits a candidate starts at
INSIDE_TEXTS = (1.0, 0.0)  # if it reads the inside of an image tower
STRENGTHS = (0.25, 0.5, 1.0, 2.0)  # of Gaussian classes beside the text logits
LARGE = 2**16  # images, with their mirror images, times classes: more start at the full text alone
ENOUGH, FEWER_STEPS = 2_000, 8  # of more training images a step is expensive, see `lowest`
SMALL = 2**25  # multiplications of a loss that a second thread makes no faster


@dataclass(frozen=True)
class TrainingSet:
    """Features of n training images of C classes, on the CPU."""

    views: Tensor  # (V, n, W), of the images, then of their mirror images: normalised parts, one after the other
    widths: Sequence[int]  # of the parts; the first is CLIP's embedding
    labels: Tensor  # (n,)
    text: Linear  # the text logits z as a linear function of the first part
    scale: float = 1.0  # a
    weights: Tensor | None = None  # (n,), how much the images count; default 1
    inside: Sequence[int] = ()  # positions of the parts from inside an image tower, see `blocks`

    def of(self, images: Tensor) -> "TrainingSet":
        """Some of the images, by positions or a mask."""
        weights = None if self.weights is None else self.weights[images]
        return replace(self, views=self.views[:, images], labels=self.labels[images], weights=weights)

    @property
    def counts(self) -> Tensor:
        """Images per class (C,)."""
        return torch.bincount(self.labels, minlength=len(self.text[0]))

    @property
    def count(self) -> float:
        """How many images they count as."""
        return len(self.labels) if self.weights is None else self.weights.sum().item()

    @cached_property
    def means(self) -> Tensor:
        """Class means (C, W) of all views, 0 for a class without images."""
        rows, labels = self.views.flatten(0, 1), self.labels.repeat(len(self.views))
        weights = None if self.weights is None else self.weights.repeat(len(self.views))
        return means_of_some(rows, labels, len(self.text[0]), weights).float()

    def text_logits(self, features: Tensor) -> Tensor:
        """Features (m, W) -> scaled text logits a z (m, C)."""
        weight, bias = self.text
        return F.linear(features[:, : self.widths[0]], self.scale * weight, self.scale * bias)

    def row_weights(self) -> Tensor:
        """The weights (V n,) of the losses of all views: each class has the same in all."""
        views, counts = len(self.views), self.counts
        totals = counts if self.weights is None else torch.bincount(self.labels, self.weights).clamp(min=1e-6)
        weights = (totals.sum() / ((counts > 0).sum() * views * totals))[self.labels]
        return (weights if self.weights is None else weights * self.weights).float().repeat(views)


class Family(NamedTuple):
    """Candidates that see the same columns and start at the same logits: one for each of `PENALTIES`, and one for each
    of `STRENGTHS`."""

    block: int  # of columns, see `blocks`
    text: float  # how much of the text logits they start at


Evidence = dict[Family, Tensor]  # the weights of each family's candidates, 1 in all


class Candidate(NamedTuple):
    """Logits: so much of the text logits, and a linear function of some columns of the features."""

    text: float
    columns: Tensor  # positions
    weight: Tensor  # (C, columns)
    bias: Tensor  # (C,)

    def logits(self, text_logits: Tensor, features: Tensor) -> Tensor:
        """Text logits (m, C) and features (m, W) of the same images -> logits (m, C)."""
        return self.text * text_logits + F.linear(features[:, self.columns], self.weight, self.bias)


def blocks(widths: Sequence[int], inside: Sequence[int] = ()) -> list[tuple[Tensor, float]]:
    """The columns that candidates see, and their scale to the length 1: all parts but those from `inside`, each of
    these but CLIP's embedding, and each from inside with the part before them.

    >>> [(columns.tolist(), round(scale, 3)) for columns, scale in blocks([2, 1, 1, 1], inside=[2])]
    [([0, 1, 2, 4], 0.577), ([2], 1.0), ([2, 3], 0.707), ([4], 1.0)]
    """
    parts, ends = torch.arange(sum(widths)).split([*widths]), [i for i in range(len(widths)) if i not in inside]
    each = [[i] if i in ends else [max(end for end in ends if end < i), i] for i in range(1, len(parts))]
    return [(torch.cat([parts[i] for i in seen]), len(seen) ** -0.5) for seen in (ends, *each)]


def families_of(images: TrainingSet) -> list[Family]:
    """The families that are worth fitting before anything is known of them."""
    size = len(images.labels) * len(images.views) * len(images.text[0])
    blocks = [(block, INSIDE_TEXTS if block in images.inside else TEXTS) for block in range(len(images.widths))]
    return [Family(block, text) for block, texts in blocks for text in texts if size <= LARGE or text == 1]


def fit_candidates(images: TrainingSet, families: Iterable[Family]) -> dict[Family, list[Candidate]]:
    """The candidates of some families, fitted to training images.

    Two classes of one image, each with the text logits 1 and 0: with the penalty 1, softmax regression adds d = 0.2 to
    the right logit and takes it from the other. Its gradient is 0: d = 1 - p, for softmax(1.2, -0.2) has p = 0.8.

    >>> images = TrainingSet(torch.eye(2)[None], [2], torch.tensor([0, 1]), (torch.eye(2), torch.zeros(2)))
    >>> text_alone, regression, *_ = fit_candidates(images, [Family(0, 1.0)])[Family(0, 1.0)]
    >>> regression.weight
    tensor([[ 0.1983, -0.1983],
            [-0.1983,  0.1983]])
    """
    x, labels = images.views.flatten(0, 1), images.labels.repeat(len(images.views))
    weights, text_logits, seen = images.row_weights(), images.text_logits(x), images.counts > 0
    candidates = {}
    with fair_threads(1 if x.numel() * len(seen) < SMALL else None):
        for block, (columns, scale) in enumerate(blocks(images.widths, images.inside)):
            texts = [family.text for family in families if family.block == block]
            if not texts:
                continue
            rows = scale * x[:, columns]
            weight, bias = gaussian_classes(rows, scale * images.means[:, columns], text_logits, seen)
            gaussian = [(strength * weight, strength * bias) for strength in STRENGTHS]
            starts = [(text * text_logits).masked_fill(~seen, -math.inf) for text in texts]
            for text, regressions in zip(texts, softmax_regressions(rows, starts, labels, weights), strict=True):
                linears = [*((d, torch.zeros_like(bias)) for d in regressions), *gaussian]
                candidates[Family(block, text)] = [Candidate(text, columns, scale * w, b) for w, b in linears]
    return candidates


def gaussian_classes(rows: Tensor, means: Tensor, text_logits: Tensor, seen: Tensor) -> Linear:
    """The scores of Gaussian classes with means (C, E), on rows (m, E) as spread as their text logits (m, C): weight
    (C, E) and bias (C,), 0 for a class that is not `seen` (C,)."""
    middle = means[seen].mean(0)
    weight = (means - middle).masked_fill(~seen[:, None], 0)
    bias = -(weight * (means + middle)).sum(1) / 2
    text, scores = (z[:, seen] - z[:, seen].mean(1, keepdim=True) for z in (text_logits, rows @ weight.T + bias))
    strength = text.std() / scores.std().clamp(min=1e-6)
    return strength * weight, strength * bias


def softmax_regressions(x: Tensor, starts: Sequence[Tensor], labels: Tensor, weights: Tensor) -> Iterator[list[Tensor]]:
    """From each of the logits `starts` (m, C), D (C, E) for each of `PENALTIES`: rows x (m, E), labels (m,), and the
    weights (m,) of their losses."""
    span, images = None, torch.arange(len(x))
    if len(x) < x.shape[1]:  # D is in the span of the rows, which has fewer dimensions
        span = torch.linalg.qr(x.T)[0]
        x = x @ span
    axes = torch.linalg.eigh((x.T @ x).double()) if len(x) > ENOUGH else None
    for start in starts:
        solutions = [torch.zeros(start.shape[1], x.shape[1])]  # for an infinite penalty; each starts at the one before
        for penalty in PENALTIES[1:]:

            def slope(d: Tensor, start: Tensor = start, penalty: float = penalty) -> tuple[Tensor, Tensor]:
                log_p = F.log_softmax(start + x @ d.T, -1)
                value = -(weights * log_p[images, labels]).sum() + penalty / 2 * d.square().sum()
                errors = log_p.exp()
                errors[images, labels] -= 1
                return value, (weights[:, None] * errors).T @ x + penalty * d

            solutions.append(lowest(slope, penalty, solutions[-1], axes))
        yield [d if span is None else d @ span.T for d in solutions]


def lowest(slope: Slope, penalty: float, d: Tensor, axes: tuple[Tensor, Tensor] | None) -> Tensor:
    """Where a loss is lowest whose value and gradient `slope` returns, by L-BFGS from D (C, E). For many images, of
    which a step is expensive, `axes` are eigenvalues and eigenvectors of X^T X: in coordinates in which the loss is
    about equally curved, X^T X / C + penalty, fewer steps come as close."""
    if axes is None:
        return lowest_point(slope, d, max_iter=STEPS, tolerance_grad=1e-3)
    values, vectors = axes[0].clamp(min=0).float(), axes[1].float()
    scale = (values / len(d) + penalty).rsqrt()
    back = (vectors * scale).T

    def curved(u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = slope(u @ back)
        return value, gradient @ back.T

    return lowest_point(curved, d @ vectors / scale, max_iter=FEWER_STEPS) @ back


def mean_of(candidates: Mapping[Family, Sequence[Candidate]], evidence: Evidence, width: int) -> Candidate:
    """The mean of candidates by their weights: one more linear function, of features (m, W)."""
    classes = len(next(iter(candidates.values()))[0].bias)
    text, weight, bias = 0.0, torch.zeros(classes, width), torch.zeros(classes)
    for family, weights in evidence.items():
        for share, each in zip(weights.tolist(), candidates[family], strict=True):
            text += share * each.text
            weight[:, each.columns] += share * each.weight
            bias += share * each.bias
    return Candidate(text, torch.arange(width), weight, bias)
