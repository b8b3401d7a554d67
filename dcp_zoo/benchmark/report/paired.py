"""Differences between methods, paired by what they share, with confidence intervals."""

from typing import TYPE_CHECKING

from dcp_zoo.benchmark.report.tables import NONE, Table

if TYPE_CHECKING:
    import pandas as pd

REFERENCE = "DCP"
PAIR = ["dataset", "shots", "seed", "target", "classes"]
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


def differences(results: "pd.DataFrame", reference: str = REFERENCE) -> "pd.DataFrame":
    """Top-1 of every label minus that of the reference, in points, for pairs with the same dataset, shots, seed and
    test classes. Columns: label, those of the pair, and `difference`."""
    base = results.loc[results.label == reference, [*PAIR, "top1"]]
    merged = results[results.shots > 0].merge(base, on=PAIR, suffixes=("", "_reference"))
    merged = merged[merged.label != reference]
    return merged.assign(difference=merged.top1 - merged.top1_reference)


def cell(values: "pd.Series") -> str:
    """Mean difference and its interval, marked if the interval excludes 0."""
    if values.empty:
        return NONE
    found = interval(values)
    if found is None:
        return f"{values.mean():+.1f}"
    low, high = found
    return f"{values.mean():+.1f} ({low:+.1f} to {high:+.1f})" + (" *" if low > 0 or high < 0 else "")


def against(results: "pd.DataFrame", reference: str = REFERENCE) -> list[Table]:
    """The few-shot protocol: every method minus the reference, by shots and over all of them."""
    pairs = differences(results[results.protocol == "few-shot"], reference)
    if pairs.empty:
        return []
    shots = sorted(pairs.shots.unique())
    rows = []
    for label, group in pairs.groupby("label", sort=False):
        by_shots = [cell(group.difference[group.shots == k]) for k in shots]
        rows.append([label, str(len(group)), *by_shots, cell(group.difference)])
    note = (
        f"Top-1 minus that of {reference}, in points: mean over pairs with the same dataset, shots and seed, and its "
        "95 % confidence interval (Student's t). * the interval excludes 0: only there is one of the two ahead."
    )
    header = ["method", "pairs", *(f"{k} shots" if k > 1 else "1 shot" for k in shots), "all"]
    return [Table(f"Differences from {reference}", header, rows, note)]
