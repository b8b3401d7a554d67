"""An accuracy on few images, with its interval. Without torch and SciPy, as `dcp-zoo info` shows it."""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

from dcp_zoo.heads.config import NO_CLASSIFIER


class Accuracy(NamedTuple):
    """How many of the images of a class are classified correctly; `name` is "" for all classes together."""

    name: str
    correct: int
    images: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval in percent: what the accuracy on many more images of this kind may be."""
        z, p = NormalDist().inv_cdf(0.975), self.correct / self.images
        half = z * math.sqrt(p * (1 - p) / self.images + (z / self.images / 2) ** 2)
        centre, scale = p + z**2 / self.images / 2, 100 / (1 + z**2 / self.images)
        return scale * (centre - half), scale * (centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.percent:.1f} % ({self.correct} of {self.images}; 95 % interval {low:.0f} to {high:.0f})"


def alone_and_probed(metrics: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Top-1 accuracy in percent of the method alone, and of the head with its text probe; None if not measured, or
    without one. `metrics` are those of a config.json or the manifest."""
    stored, alone = metrics.get("top1_stored"), metrics.get(f"top1_{NO_CLASSIFIER}")
    return (stored, None) if alone is None else (alone, stored)
