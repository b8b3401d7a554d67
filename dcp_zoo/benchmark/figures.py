"""Figures of a report, by matplotlib, which the extra `plots` installs. They belong to no window, and leave
pyplot's state alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 3.2  # inches of a panel
HEIGHT = 2.6
COLUMNS = 4  # panels side by side, at most
LINE = 0.11  # inches of the legend's height for each label, in two columns


def accuracy_figure(panels: "Mapping[str, pd.DataFrame]") -> Figure:
    """Top-1 against images per class, in a panel for each caption: the mean over seeds and a band of one
    standard deviation. Dashed: without training. Results are as of `report.with_labels`."""
    labels = dict.fromkeys(label for results in panels.values() for label in results.label)
    colours = {label: f"C{number}" for number, label in enumerate(labels)}
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = HEIGHT * rows + LINE * len(labels)
    figure = Figure(figsize=(max(2, columns) * WIDTH, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (caption, results) in zip(axes, panels.items(), strict=False):
        draw_accuracies(axis, results, colours)
        axis.set_title(caption)
        axis.set_xlabel("images per class")
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.supylabel("top-1, %")
    lines = [Line2D([], [], color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize="small")
    return figure


def draw_accuracies(axis: Any, results: "pd.DataFrame", colours: Mapping[str, str]) -> None:
    """One panel of `accuracy_figure`."""
    for label, part in results.groupby("label", sort=False):
        over_seeds = part.groupby("shots").top1.agg(["mean", "std"]).fillna({"std": 0})
        mean = over_seeds["mean"]
        std = over_seeds["std"]
        if mean.index.max() == 0:
            axis.axhline(mean.iloc[0], color=colours[label], linestyle="--")
            continue
        axis.plot(mean.index, mean, color=colours[label], marker=".")
        axis.fill_between(mean.index, mean - std, mean + std, color=colours[label], alpha=0.2)
    shots = sorted(results.shots[results.shots > 0].unique())
    if shots:
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, list(map(str, shots)))


def differences_figure(gaps: Mapping[str, tuple[float, tuple[float, float] | None]], reference: str) -> Figure:
    """A bar for each method: its mean difference from the reference in percentage points, with the
    interval."""
    figure = Figure(figsize=(6.4, 0.35 * len(gaps) + 1), layout="constrained")
    axis = figure.subplots()
    for label, (mean, limits) in gaps.items():
        axis.barh(label, mean, color="C0")
        if limits is not None:
            axis.plot(limits, [label, label], color="black", linewidth=1)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_xlabel(f"top-1 minus that of {reference}:\npercentage points, 95 % interval")
    return figure
