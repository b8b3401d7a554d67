"""Turns the rows of speed.py into the measured part of benchmarks/speed.md, the table of docs/speed.md, and plots."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
LARGE = "dcp_vitb16"  # the model in the statements


class Run(NamedTuple):
    """The rows of a CSV file, and the machine's description from the JSON file next to it."""

    rows: pd.DataFrame
    machine: dict[str, Any]


class Paths:
    """The locations of results, page and plots: in the project, or all in one folder.

    In addition to the last run, speed.csv and speed.json, there may be `speed-MACHINE.csv` and .json from other
    machines: the statements show all of them, tables and plots only the last run.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.results = folder or ROOT / "benchmarks" / "results"
        self.page = (folder or ROOT / "benchmarks") / "speed.md"
        self.plots = folder or ROOT / "docs" / "images"

    def relative(self, plot: Path) -> str:
        """The plot as the page links to it."""
        return Path(os.path.relpath(plot, self.page.parent)).as_posix()

    def read(self) -> list[Run]:
        """The last run, and those of other machines."""
        files = [self.results / "speed.csv", *sorted(self.results.glob("speed-*.csv"))]
        return [Run(pd.read_csv(file), json.loads(file.with_suffix(".json").read_text())) for file in files]


def write(paths: Paths) -> str:
    """Draw the plots and insert the measured part into the page; returns that part."""
    runs = paths.read()
    paths.plots.mkdir(parents=True, exist_ok=True)
    for old in paths.plots.glob("speed_*.png"):  # of another grid
        old.unlink()
    plots = sorted(draw(runs[0], paths.plots))
    text = measured(runs, [paths.relative(path) for path in plots])
    page = paths.page.read_text() if paths.page.exists() else BEGIN + END
    paths.page.write_text(with_measured(page, text))
    return text


def with_measured(page: str, text: str) -> str:
    """The page with its measured part replaced."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: BEGIN + text + END, page, flags=re.DOTALL)


def measured(runs: Sequence[Run], plots: Sequence[str]) -> str:
    """Markdown: the machines and the statements; tables and plots of the first run."""
    rows, machine = runs[0]
    parts = [*(machine_line(run.machine) for run in runs), statements(runs)]
    for task in ("inference", "training", "startup"):
        chosen = rows[rows.task == task]
        if len(chosen):
            parts.append(f"### {task.capitalize()}\n\n{table(chosen, machine['clock'], task)}")
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    return "\n" + "\n\n".join(parts) + "\n\n"


def machine_line(m: dict[str, Any]) -> str:
    clock = "wall clock" if m["clock"] == "seconds" else "processor time"
    libraries = ", ".join(f"{name} {m[name]}" for name in ("torch", "timm", "open_clip_torch", "onnxruntime"))
    return (
        f"Measured on {m['date']}: {m['cpu']}, {m['cores']} cores, threads: {m['threads']}, {clock}, float32 unless "
        f"noted; Python {m['python']}, {libraries}; machine load before: {m['load before']}; `{m['command']}`."
    )


# ----------------------------------------------------------------------------------------------------------- statements


class Figures:
    """Look-ups in the rows; values that were not measured, and results computed from them, are NaN."""

    def __init__(self, run: Run) -> None:
        self.rows, self.clock = run.rows, run.machine["clock"]

    def inference(self, variant: str, classes: int = 100, column: str | None = None) -> float:
        return self._figure("inference", variant, classes, 16, column)

    def training(self, variant: str, classes: int = 100, column: str | None = None) -> float:
        return self._figure("training", variant, classes, 4, column)

    def _figure(self, task: str, variant: str, classes: int, batch: int, column: str | None) -> float:
        r = self.rows
        found = r[(r.task == task) & (r.model == LARGE) & (r.variant == variant)]
        found = found[(found.classes == classes) & (found.batch == batch)]
        return float(found[column or self.clock].iloc[0]) if len(found) else float("nan")

    def start(self, variant: str) -> float:
        found = self.rows[(self.rows.task == "startup") & (self.rows.variant == variant)]
        return float(found.seconds.iloc[0]) if len(found) else float("nan")


def slope(f: Figures, variant: str, few: int, many: int) -> float:
    return (f.training(variant, many) - f.training(variant, few)) / (many - few)


class Statement(NamedTuple):
    text: str
    limit: float
    value: Callable[[Figures], float]
    at_least: bool = False
    unit: str = "x"


STATEMENTS = (
    Statement(
        "Fused inference, 100 classes, against `encode_image`",
        1.05,
        lambda f: f.inference("fused", 100) / f.inference("encode_image", 100),
    ),
    Statement(
        "Fused inference, 1,000 classes: faster than plain",
        18,
        lambda f: f.inference("plain", 1000) / f.inference("fused", 1000),
        at_least=True,
    ),
    Statement(
        "ONNX Runtime against fused in torch, 100 classes",
        1,
        lambda f: f.inference("onnxruntime", 100) / f.inference("fused", 100),
    ),
    Statement(
        "Peak memory of the fused model against the image tower alone",
        1.1,
        lambda f: f.inference("fused", 100, "peak_mb") / f.inference("encode_image", 100, "peak_mb"),
    ),
    Statement(
        "Training step, 100 classes: faster than plain",
        6,
        lambda f: f.training("plain") / f.training("ours"),
        at_least=True,
    ),
    Statement(
        "The same, with bfloat16: faster than plain in float32",
        12,
        lambda f: f.training("plain") / f.training("ours-bfloat16"),
        at_least=True,
    ),
    Statement(
        "Training step, 1,000 classes: peak memory",
        4,
        lambda f: f.training("ours", 1000, column="peak_mb") / 1000,
        unit="GB",
    ),
    Statement(
        "Training step, 1,000 classes against 10", 3, lambda f: f.training("ours", 1000) / f.training("ours", 10)
    ),
    Statement(
        "Each additional class in a training step (ours 10 to 1,000, plain 10 to 100): faster than plain",
        10,
        lambda f: slope(f, "plain", 10, 100) / slope(f, "ours", 10, 1000),
        at_least=True,
    ),
    Statement(
        "Process start to first logits of the bundled head, against imports only",
        1.3,
        lambda f: f.start("bundled head") / f.start("imports alone"),
    ),
)


def statements(runs: Sequence[Run]) -> str:
    """ViT-B/16's figures against their targets, one column per run."""
    figures = [Figures(run) for run in runs]
    names = [run.machine["cpu"] for run in runs]
    lines = [
        "| " + " | ".join(["ViT-B/16, inference at batch 16, training at batch 4", "target", *names]) + " |",
        "|---" * (2 + len(runs)) + "|",
    ]
    for s in STATEMENTS:
        limit = f"{'≥' if s.at_least else '≤'} {s.limit:g} {s.unit}"
        lines.append("| " + " | ".join([s.text, limit, *(verdict(s, s.value(f)) for f in figures)]) + " |")
    return "\n".join([*lines, "", *(costs_of_a_class(f, name) for f, name in zip(figures, names, strict=True))])


def verdict(s: Statement, value: float) -> str:
    if value != value:
        return "not measured"
    met = value >= s.limit if s.at_least else value <= s.limit
    return f"{value:.2f} {s.unit}, " + ("met" if met else "**missed**")


def costs_of_a_class(f: Figures, name: str) -> str:
    costs = [1000 * slope(f, *part) for part in (("ours", 10, 100), ("ours", 100, 1000), ("plain", 10, 100))]
    sentence = (
        "{}: each additional class costs {:.1f} ms from 10 to 100 classes and {:.1f} ms from 100 to 1,000; plain: "
        "{:.0f} ms."
    )
    return sentence.format(name, *costs).replace("nan ms", "(not measured)")


# --------------------------------------------------------------------------------------------------------------- tables


def table(rows: pd.DataFrame, clock: str, task: str) -> str:
    """All rows of a task: seconds, and ratios to the release and to CLIP's image tower within each comparison."""
    if task == "startup":
        shown = rows.assign(s=rows.seconds, x=rows.seconds / rows.seconds[rows.variant == "imports alone"].iloc[0])
        return markdown(shown, {"variant": "process", "s": "s", "x": "x imports alone"}, {"s": 2, "x": 2})
    key = ["model", "classes", "batch"]
    rows = rows.sort_values(key, kind="stable")
    base = {v: rows[rows.variant == v].set_index(key)[clock] for v in ("plain", "encode_image")}
    at = pd.MultiIndex.from_frame(rows[key])
    shown = rows.assign(
        s=rows[clock],
        faster=base["plain"].reindex(at).to_numpy() / rows[clock],
        ratio=rows[clock] / base["encode_image"].reindex(at).to_numpy(),
        differs=rows.difference.map(lambda d: "" if pd.isna(d) else f"{d:.0e}"),
        classes=rows.classes.astype(int),
        batch=rows.batch.astype(int),
    )
    columns = {"model": "model", "classes": "classes", "batch": "batch", "variant": "variant", "s": "s"}
    columns |= {"faster": "faster than plain", "ratio": "x encode_image", "peak_mb": "peak MB", "file_mb": "file MB"}
    columns |= {"differs": "logits differ", "note": "note"}
    if task == "training":
        del columns["ratio"], columns["file_mb"]
    return markdown(shown, columns, {"s": 3, "faster": 1, "ratio": 2, "peak_mb": 0, "file_mb": 0})


def markdown(rows: pd.DataFrame, columns: dict[str, str], digits: dict[str, int]) -> str:
    """A Markdown table with `digits` decimals per column; columns without any value are omitted."""
    columns = {c: title for c, title in columns.items() if rows[c].notna().any()}
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for _, r in rows.iterrows():
        cells = ["" if pd.isna(r[c]) else f"{r[c]:.{digits[c]}f}" if c in digits else str(r[c]) for c in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- plots

# Okabe and Ito's colour-blind safe colours, with distinct markers and dashes
STYLES = {
    "plain": ("#D55E00", "s", "-"),
    "unfused": ("#0072B2", "o", "-"),
    "ours": ("#0072B2", "o", "-"),
    "fused": ("#009E73", "D", "-"),
    "encode_image": ("#000000", "x", "--"),
    "onnxruntime": ("#CC79A7", "^", "-."),
    "fused-int8": ("#E69F00", "v", ":"),
    "ours-bfloat16": ("#009E73", "D", "-"),
    "ours-low-memory": ("#CC79A7", "^", "-."),
}
# x axis: the parameter that is fixed, and its value in each task
AXES = {
    "classes": ("batch", {"inference": 16, "training": 4}),
    "batch": ("classes", {"inference": 100, "training": 100}),
}


def draw(run: Run, folder: Path) -> list[Path]:
    """Plot time and memory over classes and over batch size, one file per model and axis with at least two points."""
    import matplotlib

    matplotlib.use("Agg")
    rows, clock = run.rows, run.machine["clock"]
    paths = []
    for model, of_model in rows[rows.model.notna()].groupby("model"):
        for over, (fixed, values) in AXES.items():
            chosen = {t: of_model[(of_model.task == t) & (of_model[fixed] == v)] for t, v in values.items()}
            chosen = {t: r for t, r in chosen.items() if r[r[clock].notna()][over].nunique() > 1}
            if chosen:
                titles = {t: f"{t}, {fixed} {values[t]}" for t in chosen}
                paths.append(folder / f"speed_{over}_{model}.png")
                growth(chosen, titles, clock, over, str(model), paths[-1])
    return paths


def growth(
    chosen: dict[str, pd.DataFrame], titles: dict[str, str], clock: str, over: str, model: str, path: Path
) -> None:
    """One figure: one column per task, seconds at the top and peak memory at the bottom."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    figure, axes = plt.subplots(2, len(chosen), figsize=(1 + 4.8 * len(chosen), 7), squeeze=False, sharex="col")
    for column, (task, rows) in enumerate(chosen.items()):
        for axis, (value, label, scale) in zip(
            axes[:, column], ((clock, "seconds", 1), ("peak_mb", "peak memory, GB", 1000)), strict=True
        ):
            for variant, (colour, marker, dashes) in STYLES.items():
                points = rows[(rows.variant == variant) & rows[value].notna()].sort_values(over)
                if points.empty:
                    continue
                axis.plot(points[over], points[value] / scale, dashes, color=colour, marker=marker, label=variant)
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.xaxis.set_major_locator(FixedLocator(sorted(rows[over].unique())))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_minor_locator(NullLocator())
                ticks.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(titles[task])
        axes[0, column].legend(fontsize=8)
        axes[1, column].set_xlabel(over)
    figure.suptitle(model)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
