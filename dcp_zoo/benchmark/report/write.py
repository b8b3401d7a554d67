"""A report, `report.md` with its figures next to it; and a page on the predictions of a head: accuracy per class,
confused pairs, and the mistakes as pictures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.report import tables
from dcp_zoo.data.images import thumbnails
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.fields import Values
from dcp_zoo.files import file_name, templates, write_file

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from dcp_zoo.training.evaluation import Evaluation

INK = "#111213"  # text, axes and DCP's curve
COLOURS = "#1F82C0 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #888888".split()  # safe for colour-blind readers
MARKERS = "osD^vPX*<>"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dcp", "font.family": "sans-serif", "axes.facecolor": "none"}
STYLE |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
PANEL = (3.6, 2.7)  # inches


def learning_curves(results: "pd.DataFrame") -> tuple[str, str]:
    """The learning curves of few-shot results as SVG, with a legend, and their values as text for screen readers; "" if
    there are none. Needs the extra `plots`. No curve with the batch statistics beside one with the stored ones."""
    shown = results[(results.protocol == "few-shot") & ~results.label.str.endswith(", batch")]
    panels = {title: rows for title, rows, *_ in tables.by_dataset(shown)}
    if not panels:
        return "", ""
    lines, panel_texts = curve_styles(shown), []
    with import_extra("matplotlib", "plots").rc_context(STYLE):
        columns = min(4, len(panels))
        rows = -(-len(panels) // columns)
        size = max(2, columns) * PANEL[0], rows * PANEL[1] + 0.8
        figure = import_extra("matplotlib.figure", "plots").Figure(size, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, (title, panel) in zip(axes, panels.items(), strict=False):
            draw(ax, panel, lines)
            ax.set(title=title, xlabel="images per class", ylabel="top-1 in %")
            curves = panel.groupby(["label", "shots"], sort=False).top1.mean().groupby("label", sort=False)
            texts = (
                f"{label}: " + ", ".join(f"{mean:.1f} at {k}" for (_, k), mean in c.items()) for label, c in curves
            )
            panel_texts.append(f"{title}. {'; '.join(texts)}.")
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        drawn = (ax.get_legend_handles_labels() for ax in axes)
        handles = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
        place = {"loc": "outside lower center", "ncols": min(4, len(handles)), "frameon": False}
        figure.legend(handles.values(), handles, **place)
        text = io.StringIO()
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return svg, f"Top-1 accuracy in percent over images per class. {' '.join(panel_texts)}"


def curve_styles(shown: "pd.DataFrame") -> dict[str, Values]:
    """Colour, marker and line by label: DCP is in ink, so that it stands out; methods without training are dotted."""
    lines: dict[str, Values] = {"DCP": {"color": INK, "marker": "o", "linewidth": 2.4, "zorder": 3}}
    for i, label in enumerate(label for label in shown.label.unique() if label != "DCP"):
        line = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.5}
        lines[label] = line | {"linestyle": "-" if i < len(COLOURS) else "--"}
    for label, trained in shown.groupby("label").shots.any().items():
        lines[label] |= {"markersize": 4} | ({} if trained else {"linestyle": ":", "marker": ""})
    return lines


def draw(ax: "Axes", rows: "pd.DataFrame", lines: dict[str, Values]) -> None:
    """One panel: means with a band of one standard deviation; methods without training are horizontal lines."""
    for label, group in rows.groupby("label", sort=False):
        points, line = group.groupby("shots").top1.agg(["mean", "std"]), lines[label]
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
    ax.grid(alpha=0.25, color="#888888")
    ax.spines[["top", "right"]].set_visible(False)


SECTIONS = {  # protocol: (heading, tables)
    "few-shot": ("Few-shot classification", lambda rows: [*tables.few_shot_tables(rows), *tables.against(rows)]),
    "base-to-new": ("Base-to-new generalisation", tables.base_to_new_tables),
    "cross-dataset": ("Cross-dataset transfer", lambda rows: tables.target_tables(rows, "cross-dataset")),
    "domain-shift": ("Domain shift", lambda rows: tables.target_tables(rows, "domain-shift")),
}


def write_report(folders: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Read the results in the output folders of sweeps, and write the report. Returns the paths of `report.md` and
    of its figures."""
    paths = [Path(folder) for folder in folders]
    results = store.gather(paths)
    if results.empty:
        raise ZooError(f"No result in {', '.join(map(str, paths))}: pass the --output folder of `dcp-zoo benchmark`.")
    done = {key for path in paths for key in store.done(path)}
    failed = {key: reason for path in paths for key, reason in store.failures(path).items() if key not in done}
    planned = {key for path in paths for key in store.planned(path)}
    files = {"report.md": ""}
    content = {
        "folders": [str(path) for path in paths],
        "accuracies": len(results),
        "failed": failed,
        "missing": sorted(planned - done - failed.keys()),
        "sections": [_section(group, files) for _, group in tables.with_labels(results).groupby(["model", "weights"])],
    }
    pages = templates(__package__)
    pages.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    files["report.md"] = pages.get_template("report.md.jinja").render(content)
    for name, text in files.items():
        write_file(Path(output) / name, text)
    return [Path(output) / name for name in files]


def _section(results: "pd.DataFrame", files: dict[str, str]) -> Values:
    """The content for one model; its figure is added to `files`."""
    model, weights = results.model.iloc[0], results.weights.iloc[0]
    section: Values = {"model": model, "weights": weights}
    section["protocols"] = [
        (heading, make(results)) for name, (heading, make) in SECTIONS.items() if (results.protocol == name).any()
    ]
    section["ece"], section["nll"] = (tables.few_shot_tables(results, value) for value in ("ece", "nll"))
    section["curves"], section["description"] = learning_curves(results)
    section["figure"] = name = file_name(f"learning-curves-{model}-{weights}.svg")
    if section["curves"]:
        files[name] = section["curves"]
    return section


ENOUGH = 200  # images for a statement on probabilities: bins of fewer say nothing
PICTURES, SIDE = 60, 240  # mistakes shown, and the pixels of their longer side


def write_mistakes(evaluation: "Evaluation", path: str | Path, title: str) -> None:
    """Write the page with this heading."""
    from dcp_zoo.training.evaluation import expected_calibration_error, negative_log_likelihood, reliability

    answers = evaluation.logits, evaluation.labels
    content = {"title": title, "answers": evaluation, "bins": reliability(*answers), "fewest": ENOUGH}
    content |= {"ece": expected_calibration_error(*answers), "nll": negative_log_likelihood(*answers)}
    mistakes = evaluation.mistakes[:PICTURES]
    pictures = list(zip(thumbnails((row.item.path for row in mistakes), SIDE), mistakes, strict=True))
    text = templates(__package__).get_template("mistakes.html.jinja").render(content, pictures=pictures)
    write_file(Path(path), text, "choose another --report")
