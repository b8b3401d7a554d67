"""Stacking: how much each candidate counts in the text probe, by its losses on held-out images.

Let L_k be the cross-entropy (sum) of the k-th candidate of a configuration on n held-out images. Its share
in the configuration, and the configuration's weight, are

    p_k = softmax_k(-min(1, `COUNTED` / n) L_k)
    q   = softmax(-min(1, `BETWEEN` / n) sum_k p_k L_k - `LEAN` if it reads intermediate features)

and the candidate's weight is q p_k. Up to these bounds this is pseudo Bayesian model averaging (Yao et al.,
Using Stacking to Average Bayesian Predictive Distributions, Bayesian Analysis 2018): the weights say how
strong the evidence for each candidate is. Thousands of images would choose a single one, and several
together are better: so more images count as if they were as many as the bounds.

The accuracy of the whole, stacked probe is estimated from the same folds: what it says of a fold has weights
by the losses on the other folds. Of few images these losses are of candidates that were fitted without both
folds: otherwise the images of the fold to be judged have a say in its weights, which on noise is enough for
an accuracy above chance.

Images of a class that has few give it far lower logits when they are left out than when they are fitted to,
however much the class counts. To the logits z of the stacked probe a bias b (C,) is added, which minimises

    sum_i w_i cross-entropy(z_i + b) + sum_c (b_c / s_c)^2 / 2      s_c = log(N / n_c)

over the held-out images i, with n_c images of class c, N of the largest. The w_i give each class the weight
of the one with the fewest held out. A class of N images, or of none that are held out, has no bias: where
sizes are equal, nothing is added. Chosen on the sets for choosing, see `benchmarks/notes.md`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.probe.candidates import (
    STRENGTHS,
    CandidateWeights,
    Configuration,
    Fits,
    TrainingSet,
    configurations_of,
    fit_candidates,
)
from dcp_zoo.probe.estimates import minimum
from dcp_zoo.probe.folds import FOLDS
from dcp_zoo.probe.model import PENALTIES

COUNTED = 16  # images, within a configuration
BETWEEN = 64  # images, between configurations
LEAN = 1.5  # nats by which intermediate features must be better
FEW = 100  # images, for which candidates are also fitted without each two folds
NEGLIGIBLE = 0.01  # weight of a configuration that is left out


@dataclass(frozen=True)
class CrossValidation:
    """Candidates that were fitted without folds of the training images."""

    folds: Sequence[Tensor]  # positions
    left_out: Sequence[tuple[int, ...]]  # of each fit: first each fold, then, if `by_pairs`, each two of several folds
    by_pairs: bool
    fits: Fits

    @property
    def positions(self) -> Tensor:
        """(m,), of the images of all folds."""
        return torch.cat([*self.folds])

    @cached_property
    def weights(self) -> CandidateWeights:
        """Of the candidates that are fitted to all images."""
        images = self.fits.images
        every_fold = {fold: fold for fold in range(len(self.folds))}
        return self._weights(every_fold) or prior_weights(images, images.scales(images.all))

    @cached_property
    def weights_without(self) -> list[CandidateWeights]:
        """Of the candidates that were fitted without each fold; of a single fold of many images, by
        these."""
        if len(self.folds) == 1 and not self.by_pairs:
            return [self.weights]
        found = []
        for fold in range(len(self.folds)):
            fits = {}
            for fit, left_out in enumerate(self.left_out):
                others = {*left_out} - {fold}
                if len(others) == 1 and len(left_out) == 1 + self.by_pairs:
                    fits[others.pop()] = fit
            kept = self.fits.images.select(self.fits.kept[fold])
            found.append(self._weights(fits) or prior_weights(kept, self.fits.scales[fold]))
        return found

    def _weights(self, fits: Mapping[int, int]) -> CandidateWeights:
        """By the losses on some folds, each by one of the fits, and on classes that have images in it; {} if
        there is no such image."""
        images = self.fits.images
        losses = []
        count = 0.0
        for fold, fit in fits.items():
            positions = self.folds[fold]
            positions = positions[self.fits.has_images[fit, images.labels[positions]]]
            losses.append(self.fits.losses(fit, positions))
            count += images.weights[positions].sum().item()
        if count == 0:
            return {}
        sums = {name: torch.stack([each[name] for each in losses]).sum(0) for name in losses[0]}
        return stacking_weights(sums, count, images.intermediate)

    @property
    def parts(self) -> Sequence[Tensor]:
        """Which of the images (m,) are in each fold, or part of a single one: what judges one of them comes
        from the others."""
        folds = self.folds if len(self.folds) > 1 else [self.positions[i::FOLDS] for i in range(FOLDS)]
        return [torch.isin(self.positions, fold) for fold in folds]

    def logits(self, inverse_temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (m, C) of the images of all folds by the probes without each, and the text logits that
        these start at, both times the inverse temperature; and the `class_bias` (C,) by all images, where the
        logits of each part have the one by the others."""
        pairs = [self.fits.logits(fold, self.weights_without[fold], out) for fold, out in enumerate(self.folds)]
        logits, text_logits = (inverse_temperature * torch.cat(each) for each in zip(*pairs, strict=True))
        images = self.fits.images
        counts = images.weights.double()
        sizes = torch.bincount(images.labels, counts, logits.shape[1])
        labels = images.labels[self.positions]
        weights = counts[self.positions]
        added = torch.zeros_like(logits)
        for part in self.parts:
            added[part] = class_bias(logits, labels, weights * ~part, sizes)
        return logits + added, text_logits, class_bias(logits, labels, weights, sizes)

    def distances(self, rows: Tensor | None = None) -> Tensor:
        """`Fits.distances` (m,) of the images of all folds."""
        return torch.cat([self.fits.distances(fold, out, rows) for fold, out in enumerate(self.folds)])


def cross_validate(images: TrainingSet, folds: Sequence[Tensor], is_judged: bool = True) -> CrossValidation:
    """Fit the candidates without each of the folds; for few images that are to be judged, also without each
    two."""
    by_pairs = is_judged and len(images.labels) <= FEW
    left_out: list[tuple[int, ...]] = [(fold,) for fold in range(len(folds))]
    if by_pairs and len(folds) > 2:
        left_out += combinations(range(len(folds)), 2)
    kept = torch.ones(len(left_out), len(images.labels), dtype=torch.bool)
    for fit, numbers in enumerate(left_out):
        for number in numbers:
            kept[fit, folds[number]] = False
    fits = fit_candidates(images, kept, images.scales(kept), configurations_of(images))
    return CrossValidation(folds, left_out, by_pairs, fits)


def class_bias(logits: Tensor, labels: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """The bias b (C,) by logits (m, C) of held-out images, their labels (m,), how much each counts (m,), and
    how many images each class has (C,)."""
    held_out = torch.bincount(labels, weights, len(sizes))
    widths = (sizes.max() / sizes).log().round(decimals=4).masked_fill(held_out == 0, 0)  # sums of shares are inexact
    if not widths.any():
        return torch.zeros(len(sizes))
    weights = weights * (held_out[held_out > 0].min() / held_out)[labels]
    logits = logits.double()

    def loss(units: Tensor) -> Tensor:
        losses = F.cross_entropy(logits + widths * units, labels, reduction="none")
        return weights @ losses + units.square().sum() / 2

    return (widths * minimum(loss, torch.zeros_like(widths), steps=50)).float()


def stacking_weights(
    losses: Mapping[Configuration, Tensor], images: float = 1, intermediate: Sequence[int] = ()
) -> CandidateWeights:
    """The weights of candidates, 1 in all, by their losses (sum) on so many held-out images.

    A candidate that is worse by log 2 counts half as much:

    >>> first, second = Configuration(0, 1.0), Configuration(0, 0.5)
    >>> losses = {first: torch.tensor([4.0, 4.0 + math.log(2)]), second: torch.tensor([3.0, 9.0])}
    >>> stacking_weights(losses)
    {Configuration(subset=0, text_share=1.0): tensor([0.1524, 0.0762]), \
Configuration(subset=0, text_share=0.5): tensor([0.7695, 0.0019])}
    """
    shares = {}
    scores = []
    for configuration, loss in losses.items():
        share = (-min(1.0, COUNTED / images) * loss).softmax(0)
        shares[configuration] = share
        lean = LEAN if configuration.subset in intermediate else 0.0
        scores.append(-min(1.0, BETWEEN / images) * (share @ loss) - lean)
    weights = torch.stack(scores).softmax(0)
    weights = weights.masked_fill(weights <= NEGLIGIBLE, 0)
    weights = weights / weights.sum()
    return {
        configuration: weight * shares[configuration]
        for configuration, weight in zip(losses, weights, strict=True)
        if weight > 0
    }


def prior_weights(images: TrainingSet, scale: Tensor) -> CandidateWeights:
    """What counts if none of the images can be held out, as with one image per class: softmax regressions
    that start at the text and read features that no other encoder has. All penalties count the same, unless
    text explains the training images badly: the i-th one in proportion to exp(10 i `misfit_of_text`)."""
    penalties = (10 * torch.arange(len(PENALTIES)) * misfit_of_text(images, scale)).softmax(0)
    weights = F.pad(penalties, (0, len(STRENGTHS)))  # of Gaussian classes: 0
    groups = images.clip_groups or len(images.groups)
    configurations = [
        configuration
        for configuration in configurations_of(images)
        if configuration.subset < groups and configuration.text_share > 0
    ]
    return dict.fromkeys(configurations, weights / len(configurations))


def misfit_of_text(images: TrainingSet, scale: Tensor) -> float:
    """How badly text explains the images: max(0, r - 1/4), with r zero-shot CLIP's cross-entropy in units of
    a random guess's."""
    losses = F.cross_entropy(scale * images.text_logits, images.labels, reduction="none")
    loss = (images.weights @ losses / images.weights.sum()).item()
    return max(0.0, loss / math.log(max(len(images.text[0]), 2)) - 0.25)
