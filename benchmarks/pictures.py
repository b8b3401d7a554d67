"""Keeps the documentation's pictures equal to what they show.

    python benchmarks/pictures.py     draws again those whose sources have changed

`docs/images/sources.json` has the hash of the files that each picture was drawn from. Not among them are screenshots:
those of hub/walk_pictures.py, hub/demo_picture.py and hub/label_studio/check.py need Chromium.
"""

import hashlib
import json
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import doc_tables
import quote
import speed_report
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import dcp_zoo
from dcp_zoo.zoo.registry import MODELS, OPEN_LICENSES, WEIGHTS, frontier

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SOURCES = IMAGES / "sources.json"
HEAD, OTHER = "dcp_mini.caltech101-16shot", "dcp_mini.pacs_photo-16shot"


SHOWN = {  # in the plot of averages, with their colours
    "DCP": "#999999",
    "Text probe": "#0072B2",
    "DCP, fast + text probes": "#009E73",
    "DCP + text probes": "#D55E00",
}


def save(figure: Figure, name: str) -> None:
    """Without a date, and with ids that depend on the picture alone: drawn again, the same picture is the same file."""
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(IMAGES / name, metadata={"Date": None})


def averages() -> None:
    """Averages over the sets and the draws that all have: over images per class, and at four images per class over the
    CPU time of training."""
    found = quote.on_sets()["top1"][[*SHOWN]].dropna()
    figure = Figure((5.4, 6), layout="constrained")  # one above the other: side by side is too small for a phone
    top, bottom = figure.subplots(2)
    for label, color in SHOWN.items():
        means = found[label].groupby("images_per_class").mean()
        top.plot(means.index, means, marker="o", color=color, label=label)
        seconds = quote.set_mean(label, 4, "train_cpu_seconds")
        bottom.plot(seconds, means[4], marker="o", color=color)
        bottom.annotate(label, (seconds, means[4]), (7, -3), textcoords="offset points", fontsize=8)
    top.set(xscale="log", xlabel="images per class", ylabel="top-1, %")
    top.set_xticks(means.index, means.index.astype(str))
    bottom.set(xscale="log", xlabel="CPU seconds of training, 4 images per class", ylabel="top-1, %", xlim=(4, 250))
    bottom.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
    for ax in (top, bottom):
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    top.legend(frameon=False, fontsize=8)
    save(figure, "averages.svg")


def reads() -> None:
    """What the backbone adds on each reporting set, by images per class."""
    found = quote.reads()
    gains = (found["embedding and backbone"] - found["embedding"]).unstack()
    figure = Figure((5.4, 3.4), layout="constrained")
    ax = figure.subplots()
    for name, row in gains.iterrows():
        ax.plot(range(len(row)), row, marker="o", label=name)
    ax.axhline(0, color="#444444", linewidth=0.8)
    ax.set(xlabel="images per class", ylabel="gain in top-1, points", ylim=(min(0, gains.min().min()) - 0.5, None))
    ax.set_xticks(range(len(gains.columns)), gains.columns.astype(str))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    save(figure, "reads.svg")


# colours that the colour-blind tell apart, with markers and dashes of their own
LINES = {
    "plain": ("#D55E00", "s", "-"),
    "unfused": ("#0072B2", "o", "-"),
    "ours": ("#0072B2", "o", "-"),
    "fused": ("#009E73", "D", "-"),
    "encode_image": ("#000000", "x", "--"),
    "onnxruntime": ("#CC79A7", "^", "-."),
    "ours-bfloat16": ("#009E73", "D", "-"),
    "ours-low-memory": ("#CC79A7", "^", "-."),
}


def speed() -> None:
    """Seconds and peak memory over classes: inference on the left, training on the right."""
    rows = speed_report.runs()[0].rows.query("model == @speed_report.LARGE")
    figure = Figure((10.6, 7), layout="constrained")
    for column, (task, batch) in zip(
        figure.subplots(2, 2, sharex="col").T, (("inference", 16), ("training", 4)), strict=True
    ):
        chosen = rows[(rows.task == task) & (rows.batch == batch)]
        for ax, (value, label, scale) in zip(
            column, (("seconds", "seconds", 1), ("peak_mb", "peak memory, GB", 1000)), strict=True
        ):
            for variant, (color, marker, dashes) in LINES.items():
                points = chosen[(chosen.variant == variant) & chosen[value].notna()].sort_values("classes")
                if len(points):
                    ax.plot(points.classes, points[value] / scale, dashes, color=color, marker=marker, label=variant)
            ax.set(xscale="log", yscale="log", ylabel=label)
            ax.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        column[0].set_title(f"{task}, batch {batch}")
        column[0].legend(fontsize=8)
        column[1].set_xlabel("classes")
    save(figure, "speed.svg")


OPEN, EVERY = "MIT or Apache-2.0", "every licence"


def models() -> None:
    """Published zero-shot accuracies over the operations of an image, and which models are best for their cost."""
    figure = Figure((5.4, 7), layout="constrained")
    titles = {"zero_shot": "mean of ten datasets", "imagenet": "ImageNet"}
    for ax, (name, title) in zip(figure.subplots(2, sharex=True), titles.items(), strict=True):
        best = {EVERY: frontier(name), OPEN: frontier(name, OPEN_LICENSES)}
        for licence, specs in best.items():
            color = "#0072B2" if licence == OPEN else "#D55E00"
            drawn = [
                s for s in MODELS.values() if getattr(s, name) and (s.license in OPEN_LICENSES) == (licence == OPEN)
            ]
            for spec in drawn:
                ax.plot(
                    spec.gflops, getattr(spec, name), "o", color=color, fillstyle="full" if spec in specs else "none"
                )
            costs, values = [s.gflops for s in specs], [getattr(s, name) for s in specs]
            ax.step(costs, values, where="post", color=color, label=licence, zorder=licence == OPEN)
            for spec, following in zip(specs, [*costs[1:], math.inf], strict=True):
                if spec in drawn and following > 1.05 * spec.gflops:  # else its label would be hidden
                    place = {"xytext": (5, -9), "ha": "left"} if licence == OPEN else {"xytext": (-3, 4), "ha": "right"}
                    label = spec.name.removeprefix("dcp_")
                    ax.annotate(
                        label, (spec.gflops, getattr(spec, name)), textcoords="offset points", fontsize=7, **place
                    )
        ax.set(xscale="log", ylabel=f"zero-shot top-1, %, {title}", xlim=(6, 2000))
        ax.grid(alpha=0.3)
    ax.set(xlabel="GFLOPs per image")
    ax.set_xticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1,000"])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8, loc="lower right", title="best for its cost")
    save(figure, "models.svg")


@torch.inference_mode()
def explained() -> None:
    """How far CMPA moves each prompt before each coupled block, |new - old| / |old|."""
    model = dcp_zoo.create_model(HEAD, pretrained=True).eval()
    steps = [step for step in model.couplings(lambda i: model.stored_stats[i - 1]) if step.v is not None]
    pairs = {"vision": [(step.v, step.new_v) for step in steps], "text": [(step.t, step.new_t) for step in steps]}
    axes = Figure((7, 4), layout="constrained").add_subplot()
    for (tower, changes), color in zip(pairs.items(), ("tab:blue", "tab:orange"), strict=True):
        rows = torch.stack([(new - old).norm(dim=-1) / old.norm(dim=-1) for old, new in changes])
        blocks = range(1, len(rows) + 1)
        axes.plot(blocks, rows, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(blocks, rows.mean(1), color=color, marker="o", label=f"{tower} prompts, mean and each")
    axes.set(title=f"{HEAD}: how far CMPA moves the prompts", xlabel="before block", ylabel="|new - old| / |old|")
    axes.set(xticks=list(blocks), yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(IMAGES / "explained.png", dpi=150, format="png")


def script(path: str) -> Callable[[], None]:
    """The function `main` of a script."""
    return lambda: runpy.run_path(str(ROOT / path))["main"]()


class Picture(NamedTuple):
    draw: Callable[[], None]
    sources: Sequence[Path]


PICTURES = {
    "averages.svg": Picture(averages, [doc_tables.RESULTS / "many_sets.csv", ROOT / "benchmarks" / "sets.py"]),
    "reads.svg": Picture(reads, [doc_tables.RESULTS / "reads.csv", ROOT / "benchmarks" / "sets.py"]),
    "speed.svg": Picture(speed, [doc_tables.RESULTS / "speed.csv"]),
    "explained.png": Picture(explained, [WEIGHTS / HEAD / "model.safetensors"]),
    "models.svg": Picture(models, [ROOT / "dcp_zoo" / "zoo" / "models.yaml"]),
    "predictions.webp": Picture(
        script("hub/predictions.py"), [WEIGHTS / head / "model.safetensors" for head in (HEAD, OTHER)]
    ),
}


def sources(picture: Picture) -> str:
    """The hash of the files that a picture is drawn from."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in picture.sources)).hexdigest()[:12]


def outdated() -> list[str]:
    """The pictures that show something else than their sources have."""
    known = json.loads(SOURCES.read_text()) if SOURCES.exists() else {}
    return [name for name, picture in PICTURES.items() if known.get(name) != sources(picture)]


def main() -> None:
    for name in outdated():
        PICTURES[name].draw()
        print("Drawn:", name)
    SOURCES.write_text(json.dumps({name: sources(picture) for name, picture in PICTURES.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
