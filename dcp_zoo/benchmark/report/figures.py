"""Learning curves: accuracy over shots, one panel per dataset and one for their average."""

import io
import re
from typing import TYPE_CHECKING, Any

from dcp_zoo.benchmark.report.tables import averaged, datasets_of
from dcp_zoo.errors import import_extra

if TYPE_CHECKING:
    import pandas as pd

INK = "#111213"  # text, axes and DCP's curve
COLOURS = "#1F82C0 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #888888".split()  # safe for colour-blind readers
MARKERS = "osD^vPX*<>"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dcp", "font.family": "sans-serif", "axes.facecolor": "none"}
STYLE |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
PANEL = (3.6, 2.7)  # inches


class LearningCurves:
    """The curves of the few-shot results, with their labels. Needs the extra `plots`.

    Attributes:
        panels: the results of each panel by its title; curves with the batch statistics are omitted if there is one
            with the stored ones.
        lines: colour, marker and line of each curve; DCP is in ink, so that it stands out, and methods without training
            are dotted.
    """

    def __init__(self, results: "pd.DataFrame") -> None:
        shown = results[(results.protocol == "few-shot") & ~results.label.str.endswith(", batch")]
        names = datasets_of(shown)
        self.panels = {f"Average of {len(names)} datasets": averaged(shown)} if len(names) > 1 else {}
        self.panels |= {name: shown[shown.dataset == name] for name in names}
        trained = shown.groupby("label").shots.any()
        others = [label for label in shown.label.unique() if label != "DCP"]
        self.lines = {label: self._line(label, others, trained[label]) for label in shown.label.unique()}

    @staticmethod
    def _line(label: str, others: list[str], trained: bool) -> dict[str, Any]:
        if label == "DCP":
            line: dict[str, Any] = {"color": INK, "marker": "o", "linestyle": "-", "linewidth": 2.4, "zorder": 3}
        else:
            i = others.index(label)
            line = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.5}
            line["linestyle"] = "-" if i < len(COLOURS) else "--"
        return {"markersize": 4} | line | ({} if trained else {"linestyle": ":", "marker": ""})

    def file(self) -> str:
        """All panels and a legend as SVG."""
        with import_extra("matplotlib", "plots").rc_context(STYLE):
            columns = min(4, len(self.panels))
            rows = -(-len(self.panels) // columns)
            size = max(2, columns) * PANEL[0], rows * PANEL[1] + 0.8
            figure = import_extra("matplotlib.figure", "plots").Figure(size, layout="constrained")
            axes = list(figure.subplots(rows, columns, squeeze=False).flat)
            for ax, title in zip(axes, self.panels, strict=False):
                self._draw(ax, title)
            for ax in axes[len(self.panels) :]:
                ax.set_axis_off()
            handles = {
                label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
            }
            place = {"loc": "outside lower center", "ncols": min(4, len(handles)), "frameon": False}
            figure.legend(handles.values(), handles, **place)
            text = io.StringIO()
            figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
        return _without_unused_ids(text.getvalue()[text.getvalue().index("<svg") :])

    def text(self) -> str:
        """The values of the curves as text, for screen readers."""
        panels = []
        for title, rows in self.panels.items():
            curves = []
            for label, group in rows.groupby("label", sort=False):
                means = group.groupby("shots").top1.mean()
                curves.append(f"{label}: " + ", ".join(f"{mean:.1f} at {k}" for k, mean in means.items()))
            panels.append(f"{title}. {'; '.join(curves)}.")
        return f"Top-1 accuracy in percent over images per class. {' '.join(panels)}"

    def _draw(self, ax: Any, title: str) -> None:
        """One panel: means with a band of one standard deviation; methods without training are horizontal lines."""
        rows = self.panels[title]
        for label, group in rows.groupby("label", sort=False):
            points, line = group.groupby("shots").top1.agg(["mean", "std"]), self.lines[label]
            if list(points.index) == [0]:
                ax.axhline(points["mean"][0], label=label, **line)
                continue
            points = points.drop(index=0, errors="ignore").fillna(0)
            ax.plot(points.index, points["mean"], label=label, **line)
            band = {"color": line["color"], "alpha": 0.15, "linewidth": 0}
            ax.fill_between(points.index, points["mean"] - points["std"], points["mean"] + points["std"], **band)
        shots = sorted(set(rows.shots) - {0})
        ax.set_xscale("log", base=2)
        ax.set_xticks(shots, [str(k) for k in shots])
        ax.set(title=title, xlabel="images per class", ylabel="top-1 in %")
        ax.grid(alpha=0.25, color="#888888")
        ax.spines[["top", "right"]].set_visible(False)


def _without_unused_ids(svg: str) -> str:
    """An `<svg>` element without ids that it does not use: several figures may be on one page."""
    used = set(re.findall(r"#([\w-]+)", svg))
    return re.sub(r' id="([\w-]+)"', lambda m: m[0] if m[1] in used else "", svg)
