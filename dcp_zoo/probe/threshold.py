"""Thresholds: below which score an image belongs to none of the classes, by the scores of images that were
left out.

The scores are `in_distribution_score`s, taken to be normally distributed; one in twenty images is refused
unless asked otherwise. Examples of images of no class reject what is nearer to one of them than to the class
means, by a margin. Other rules, and validation images: see `benchmarks/notes.md`.

Of images that are not refused, the probabilities of those that were left out set from which one on a class
is in an image's set (split conformal prediction), and from which one on the most probable class can be
trusted (the Clopper-Pearson bound of what is wrong). Both count a group of images as one.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.fields import Values
from dcp_zoo.probe.model import HeldOut
from dcp_zoo.promises import COVERAGES, SURE, TRUSTED, WRONG, images_for_trust
from dcp_zoo.rejection import REFUSED

REJECT_RATES = (0.01, 0.02, REFUSED, 0.1, 0.2, 0.3)  # shares of the images of known classes
THRESHOLD_IMAGES = 20  # for a threshold, which rejects one in twenty
LIKE_EXAMPLES = 0.02  # the share of images of known classes that examples of no class may reject


def thresholds_of(scores: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """For each of `REJECT_RATES` the score below which so many images of the classes are, by the scores (n,)
    of some and how much these count (n,).

    With a mean of 0 and a standard deviation of 1, one score in twenty is below -1.64:

    >>> thresholds_of(Tensor([-1, 0, 1]))["0.05"]
    -1.6448536269514726
    """
    weights = torch.ones_like(scores) if weights is None else weights
    return {f"{rate:g}": quantile(scores, weights, rate) for rate in REJECT_RATES}


def quantile(values: Tensor, weights: Tensor, share: float) -> float:
    """Below which value this share of normally distributed ones is, by some of them (n,), with weights
    (n,)."""
    deviation = torch.cov(values, aweights=weights).sqrt()
    return average(values, weights).item() + deviation.item() * NormalDist().inv_cdf(share)


def average(values: Tensor, weights: Tensor) -> Tensor:
    """The mean () of values (n,), with weights (n,)."""
    return weights @ values / weights.sum()


def share_above(thresholds: Mapping[str, float], scores: np.ndarray) -> dict[str, float]:
    """The percentage of scores (n,) that are not below each threshold."""
    return {rate: round(100 * float((scores >= threshold).mean()), 1) for rate, threshold in thresholds.items()}


def promises_of(held_out: HeldOut, labels: Tensor, weights: Tensor) -> Values:
    """What a head promises of images like those (m,) that were left out and are not refused, by their labels
    (m,) and how much each counts (m,): "sets", by coverage the probability from which on a class is in the
    set; "trusted", by the largest share of wrong ones the confidence from which on predictions are trusted;
    only those that so many "images" can promise; and the "share" of images, in percent, that is trusted to
    be at most 5 % wrong, or None."""
    assert held_out.rejected is not None
    like = ~held_out.rejected
    all_images = weights.sum()
    weights = weights[like].double()
    probabilities = held_out.logits[like].double().softmax(-1)
    own = probabilities.gather(1, labels[like, None])[:, 0]
    confidence, predicted = probabilities.max(-1)
    wrong = predicted != labels[like]
    sets = {f"{coverage:g}": probability_covering(own, weights, coverage) for coverage in COVERAGES}
    trusted = {f"{share:g}": confidence_allowing(confidence, wrong, weights, share) for share in WRONG}
    promises: Values = {"images": round(weights.sum().item(), 1)}
    for name, found in {"sets": sets, "trusted": trusted}.items():
        promises[name] = {level: floored(value) for level, value in found.items() if value is not None}
    least = promises["trusted"].get(f"{TRUSTED:g}")
    share = None if least is None else weights[confidence >= least].sum().item() / all_images.item()
    return promises | {"share": share and round(100 * share, 1)}


def floored(probability: float) -> float:
    """To six digits; a confidence that rounds to 1 would trust nothing."""
    return math.floor(1e6 * probability) / 1e6


def probability_covering(own: Tensor, weights: Tensor, coverage: float) -> float | None:
    """The probability that this share of images gives its own class at least, by those of some (n,) and how
    much each counts (n,): of split conformal prediction, which counts one image more. None for too few
    images.

    >>> probability_covering(Tensor([0.9, 0.7, 0.8, 0.6]), torch.ones(4), 0.5)
    0.699999988079071
    """
    values, order = own.sort(descending=True)
    enough = weights[order].cumsum(0) >= coverage * (weights.sum() + 1) - 1e-6
    return values[enough][0].item() if enough.any() else None


def confidence_allowing(confidence: Tensor, wrong: Tensor, weights: Tensor, share: float) -> float | None:
    """The lowest confidence from which on at most this share of predictions is `wrong` (n,), with `SURE`, by
    some confidences (n,) and how much each counts (n,); None if no such confidence is known. From the surest
    on, as soon as they are enough, more and more are tested until a test fails, so that the number of tests
    costs nothing (Angelopoulos et al., Learn then Test, arXiv 2110.01052)."""
    from scipy.special import betaincinv  # slow, and predictions need no thresholds of their own

    values, order = confidence.sort(descending=True)
    seen = weights[order].cumsum(0)
    errors = (weights * wrong)[order].cumsum(0)
    right = (seen - errors).clamp(min=1e-9)
    bound = torch.from_numpy(betaincinv((errors + 1).numpy(), right.numpy(), SURE))
    is_last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])[: len(values)]
    too_few = seen < images_for_trust(share) - 1e-6
    holds = ((bound <= share) | too_few | ~is_last).long().cumprod(0).bool()
    allowed = holds & is_last & ~too_few
    return values[allowed][-1].item() if allowed.any() else None
