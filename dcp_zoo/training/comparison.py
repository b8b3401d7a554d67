"""Which of two heads is better, by their answers on the same images. Photographs that were taken together
are one group, and any other image is a group of its own."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import binomtest, norm

from dcp_zoo.training.evaluation import Evaluation

LEVEL = 0.95
POWER = 0.8  # with which `more_images` would tell a difference
DRAWS = 10_000  # of the bootstrap


@dataclass(frozen=True)
class Comparison:
    """Two heads on the same images in the same order, of which each classifies into its own classes."""

    first: Evaluation
    second: Evaluation

    @cached_property
    def gains(self) -> np.ndarray:
        """By group (G, 2): how many more of its images the first classifies correctly, and its images."""
        right = [(each.predicted == each.labels).int() for each in (self.first, self.second)]
        groups = self.first.groups.numpy()
        gained = np.bincount(groups, weights=(right[0] - right[1]).numpy())
        return np.stack([gained, np.bincount(groups)], 1)

    @property
    def wins(self) -> tuple[int, int]:
        """The groups in which the first is right more often, and in which the second is."""
        gained = self.gains[:, 0]
        return int((gained > 0).sum()), int((gained < 0).sum())

    @property
    def difference(self) -> float:
        """The accuracy of the first minus that of the second, in percentage points."""
        return 100 * float(self.gains[:, 0].sum() / self.gains[:, 1].sum())

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test, over groups; 1 if no answers differ."""
        first, second = self.wins
        return float(binomtest(first, first + second).pvalue) if first + second else 1.0

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `difference`: by a bootstrap over groups; or if each image is alone that of
        McNemar's test, Clopper and Pearson's of the share of differing answers that the first has right."""
        gains = self.gains
        total = len(gains)
        first, second = self.wins
        differ = first + second
        if not differ:  # of so many groups none differs
            most = 100 * (1 - ((1 - LEVEL) / 2) ** (1 / total))
            return -most, most
        if (gains[:, 1] > 1).any():
            kinds, counts = np.unique(gains, axis=0, return_counts=True)
            drawn = np.random.default_rng(0).multinomial(total, counts / total, DRAWS) @ kinds
            low, high = np.quantile(100 * drawn[:, 0] / drawn[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            return float(low), float(high)
        ends = binomtest(first, differ).proportion_ci(LEVEL)
        return 100 * differ / total * (2 * ends.low - 1), 100 * differ / total * (2 * ends.high - 1)

    @property
    def better(self) -> int:
        """1 if the first is better, -1 if the second is, 0 if it cannot be told: both the test and the
        interval have to agree, as a bootstrap of few groups is too sure."""
        low, high = self.interval
        if self.p_value > 1 - LEVEL or low <= 0 <= high:
            return 0
        first, second = self.wins
        return int(low > 0 and first > second) - int(high < 0 and first < second)

    @property
    def more_images(self) -> int | None:
        """About how many more images would tell which is better, in four of five cases, if the heads differ
        as here; None if none is ahead.

        By the normal approximation of the sign test, in which the share of groups that the one ahead wins
        has a win more on either side, as few groups exaggerate it, or by the width of the interval, if that
        asks for more."""
        first, second = self.wins
        difference = self.difference
        if not difference or first == second:
            return None
        z = float(norm.ppf((1 + LEVEL) / 2))
        z_power = float(norm.ppf(POWER))
        share = (max(first, second) + 1) / (first + second + 2)
        groups = ((z / 2 + z_power * math.sqrt(share * (1 - share))) / (share - 1 / 2)) ** 2
        low, high = self.interval
        by_interval = ((high - low) / 2 / z * (z + z_power) / difference) ** 2
        images = len(self.first) * (max(groups / (first + second), by_interval) - 1)
        return math.ceil(max(images, 1))

    @property
    def verdict(self) -> str:
        if self.better:
            return f"{'A' if self.better > 0 else 'B'} is better"
        more = self.more_images
        if more is None:
            return "cannot be told: neither is ahead"
        return f"cannot be told yet: about {float(f'{more:.2g}'):,.0f} more images"
