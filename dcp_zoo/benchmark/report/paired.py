"""Differences between methods, paired by what they share, with confidence intervals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dcp_zoo.benchmark.report.tables import EMPTY, IDENTITY, Table, with_spread

if TYPE_CHECKING:
    import pandas as pd

TESTED = ["dataset", "target", "classes"]
CONFIDENCE = 0.95


def interval(differences: "pd.Series") -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of paired differences, by Student's t; None for fewer than two."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return None
    if differences.std() == 0:
        return float(differences.mean()), float(differences.mean())
    low, high = ttest_1samp(differences, 0).confidence_interval(CONFIDENCE)
    return float(low), float(high)


def differences(results: "pd.DataFrame", base: "pd.DataFrame", on: Sequence[str] | None = None) -> "pd.DataFrame":
    """Every pair of a result and one of `base` with the same dataset, shots, seed and test classes, or the same values
    `on` other columns, with a column `difference`: top-1 minus that of the base, in points. A method without training
    is paired with all shots and seeds."""
    if on is None:
        on = [*TESTED, "shots", "seed"] if min(results.shots.max(), base.shots.max()) > 0 else TESTED
    pairs = results.merge(base, on=list(on), suffixes=("", "_base"))
    return pairs.assign(difference=pairs.top1 - pairs.top1_base)


def difference_cell(values: "pd.Series") -> str:
    """Mean difference and its interval, marked if the interval excludes 0."""
    if values.empty:
        return EMPTY
    found = interval(values)
    if found is None:
        return f"{values.mean():+.1f}"
    low, high = found
    return f"{values.mean():+.1f} ({low:+.1f} to {high:+.1f})" + (" *" if low > 0 or high < 0 else "")


def against(results: "pd.DataFrame", reference: str = "DCP") -> list[Table]:
    """The few-shot protocol: every trained method minus the reference, by shots and over all of them."""
    trained = results[(results.protocol == "few-shot") & (results.shots > 0)]
    is_reference = trained.label == reference
    pairs = differences(trained[~is_reference], trained[is_reference])
    if pairs.empty:
        return []
    shots = sorted(pairs.shots.unique())
    rows = []
    for label, group in pairs.groupby("label", sort=False):
        by_shots = [difference_cell(group.difference[group.shots == k]) for k in shots]
        rows.append([label, str(len(group)), *by_shots, difference_cell(group.difference)])
    note = (
        f"Top-1 minus that of {reference}, in points: mean over pairs with the same dataset, shots and seed, and its "
        "95 % confidence interval (Student's t). * the interval excludes 0: only there is one of the two ahead."
    )
    header = ["method", "pairs", *(f"{k} shots" if k > 1 else "1 shot" for k in shots), "all"]
    return [Table(f"Differences from {reference}", header, rows, note)]


def options_against_default(results: "pd.DataFrame") -> list[Table]:
    """The effect of changed options: differences from the unchanged method, paired by seed and everything else."""
    is_default = results.options == ""
    pairs = differences(results[~is_default], results[is_default], [x for x in IDENTITY if x != "options"])
    rows = []
    for (protocol, label), group in pairs.groupby(["protocol", "label"], sort=False):
        time = group.train_seconds.mean() / group.train_seconds_base.mean()
        row = [label, protocol, str(len(group)), f"{group.top1_base.mean():.2f}", f"{group.top1.mean():.2f}"]
        rows.append([*row, with_spread(group.difference, "+.2f"), EMPTY if time != time else f"{time:.2f} x"])
    header = ["method (changed options)", "protocol", "pairs", "unchanged", "changed", "difference", "training time"]
    note = "A pair has the same dataset, shots, seed, target and stats. Top-1 in percent, difference in points."
    return [Table("Changed options against the unchanged method", header, rows, note)] if rows else []
