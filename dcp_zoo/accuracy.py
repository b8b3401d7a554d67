"""An accuracy with its 95 % Wilson interval, here without torch and NumPy."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dcp_zoo.errors import shorten

Z = 1.9599639845400536  # standard deviations around the mean that hold 95 % of a normal distribution


def wilson(p: float, n: float) -> tuple[float, float]:
    """The 95 % Wilson interval in percent of a share p of n images.

    >>> [round(end, 1) for end in wilson(0.9, 10)]
    [59.6, 98.2]
    """
    half = Z * math.sqrt(p * (1 - p) / n + (Z / n / 2) ** 2)
    centre = p + Z**2 / n / 2
    scale = 100 / (1 + Z**2 / n)
    return max(0.0, scale * (centre - half)), min(100.0, scale * (centre + half))


class Accuracy(NamedTuple):
    """How many of the images of a class are classified correctly.

    Attributes:
        name: of the class; "" for all classes together.
        correct, images: how many.
        independent: the effective number of images, (sum m)^2 / sum m^2 for groups of m images that were
            taken together, see `dcp_zoo.data.groups`. Default: as many as the images.
        untested: classes of which there is no image.
        at_most: of images that look like few subjects, see `dcp_zoo.features.groups`, and are counted by
            these, the upper end of the interval by images that each count alone.
    """

    name: str
    correct: int
    images: int
    independent: float | None = None
    untested: Sequence[str] = ()
    at_most: float | None = None

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval in percent: what the accuracy on many more images of this kind may be."""
        low, high = wilson(self.correct / self.images, self.independent or self.images)
        return low, max(high, self.at_most or 0)

    def __str__(self) -> str:
        """What holds on one side first: heads are seldom worse than their interval, and often better."""
        counted = f"{self.correct} of {self.images}"
        if self.independent is not None and self.independent <= self.images - 0.5:
            counted += f", in groups, which count as {self.independent:.0f}"
        low, high = self.interval
        at_least = math.floor(low)
        interval = f"95 % interval {at_least} to {math.ceil(high)}"
        if self.untested:
            interval += f"; both without {shorten(self.untested)}"
        told = f"at least {at_least} % (97.5 % sure)"
        if self.at_most is not None:
            told = f"{at_least} to {math.ceil(high)} % on other subjects"
        return f"{told}; estimate {self.percent:.1f} % ({counted}; {interval})"
