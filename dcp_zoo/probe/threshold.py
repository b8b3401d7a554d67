"""Thresholds: below which score an image belongs to none of the classes, by the scores of images that were
left out.

The scores are `in_distribution_score`s, taken to be normally distributed; one in twenty images is refused
unless asked otherwise. Examples of images of no class reject what is nearer to one of them than to the class
means, by a margin. Other rules, and validation images: see `benchmarks/notes.md`.
"""

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

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
