"""Learning curves: accuracy over shots, one panel per dataset and one for their average."""

import io
import re
from typing import TYPE_CHECKING, Any

from dcp_zoo.benchmark.report.tables import averaged, datasets_of
from dcp_zoo.errors import import_extra

if TYPE_CHECKING:
    import pandas as pd

INK = "#111213"  # text, axes and DCP's curve; pages with a dark mode replace it by `currentColor`
COLOURS = "#1F82C0 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #888888".split()  # safe for colour-blind readers
MARKERS = "osD^vPX*<>"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dcp", "font.family": "sans-serif", "axes.facecolor": "none"}
STYLE |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
PANEL = (3.6, 2.7)  # inches


def styles(labels: list[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each curve; DCP is in ink, so that it stands out."""
    others = [label for label in labels if label != "DCP"]
    found = {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "-" if i < 7 else "--",
        }
        for i, label in enumerate(others)
    }
    return {"DCP": {"color": INK, "marker": "o", "linestyle": "-", "linewidth": 2.4, "zorder": 3}} | found


def panels(results: "pd.DataFrame") -> dict[str, "pd.DataFrame"]:
    """The results in each panel; curves with the batch statistics are omitted if there is a calibrated one."""
    shown = results[(results.protocol == "few-shot") & ~results.label.str.endswith(", batch")]
    names = datasets_of(shown)
    found = {name: shown[shown.dataset == name] for name in names}
    return ({f"Average of {len(names)} datasets": averaged(shown, "top1")} if len(names) > 1 else {}) | found


def draw(ax: Any, rows: "pd.DataFrame", title: str, style: dict[str, dict[str, Any]]) -> None:
    """One panel: means with a band of one standard deviation; methods without training are horizontal lines."""
    for label, group in rows.groupby("label", sort=False):
        points = group.groupby("shots").top1.agg(["mean", "std"])
        line = {"linewidth": 1.5, "markersize": 4} | style[label]
        if list(points.index) == [0]:
            ax.axhline(points["mean"][0], label=label, **line | {"linestyle": ":", "marker": ""})
            continue
        points, spread = points.drop(index=0, errors="ignore"), points["std"].fillna(0)
        ax.plot(points.index, points["mean"], label=label, **line)
        low, high = points["mean"] - spread, points["mean"] + spread
        ax.fill_between(
            points.index, low[points.index], high[points.index], color=line["color"], alpha=0.15, linewidth=0
        )
    shots = sorted(set(rows.shots) - {0})
    ax.set_xscale("log", base=2)
    ax.set_xticks(shots, [str(k) for k in shots])
    ax.set(title=title, xlabel="images per class", ylabel="top-1 in %")
    ax.grid(alpha=0.25, color="#888888")
    ax.spines[["top", "right"]].set_visible(False)


def figure_svg(found: dict[str, "pd.DataFrame"], style: dict[str, dict[str, Any]]) -> str:
    """All panels and a legend on white, for a separate file."""
    matplotlib = import_extra("matplotlib", "plots")
    with matplotlib.rc_context(STYLE):
        columns = min(4, len(found))
        rows = -(-len(found) // columns)
        figure = _figure(max(2, columns) * PANEL[0], rows * PANEL[1] + 0.8)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, (title, data) in zip(axes, found.items(), strict=False):
            draw(ax, data, title, style)
        for ax in axes[len(found) :]:
            ax.set_axis_off()
        handles = {
            label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
        return _svg(figure, "white")


def panel_svg(title: str, rows: "pd.DataFrame", style: dict[str, dict[str, Any]]) -> str:
    """One panel for a page: no background, and text in the page's text colour."""
    with import_extra("matplotlib", "plots").rc_context(STYLE):
        figure = _figure(*PANEL)
        draw(figure.subplots(), rows, title, style)
        return _svg(figure, "none").replace(INK, "currentColor")


def swatch_svg(line: dict[str, Any], horizontal: bool) -> str:
    """A short piece of a curve, for the legend of a page."""
    with import_extra("matplotlib", "plots").rc_context(STYLE):
        figure = _figure(0.5, 0.2, layout=None)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.plot([0, 1, 2], [0, 0, 0], markevery=[1], **line | ({"linestyle": ":", "marker": ""} if horizontal else {}))
        ax.set_axis_off()
        return _svg(figure, "none").replace(INK, "currentColor")


def _figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    return import_extra("matplotlib.figure", "plots").Figure((width, height), layout=layout)


def _svg(figure: Any, background: str) -> str:
    """The figure as an `<svg>` element, without unused ids, which would repeat when several are on one page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor=background, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", svg))
    return re.sub(r' id="([\w-]+)"', lambda m: m[0] if m[1] in used else "", svg)


def describe(title: str, rows: "pd.DataFrame") -> str:
    """The values in a panel as text, for screen readers."""
    curves = []
    for label, group in rows.groupby("label", sort=False):
        means = group.groupby("shots").top1.mean()
        curves.append(f"{label}: " + ", ".join(f"{mean:.1f} at {k}" for k, mean in means.items()))
    return f"Top-1 accuracy in percent over images per class, {title}. {'; '.join(curves)}."
