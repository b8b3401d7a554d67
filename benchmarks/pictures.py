"""Keeps the documentation's pictures equal to what they show.

    python benchmarks/pictures.py     draws again those whose sources have changed

`docs/images/sources.json` has the hash of the files that each picture was drawn from. Not among them are
screenshots: those of hub/walk_pictures.py, hub/demo_picture.py and hub/label_studio/check.py need Chromium.
"""

import hashlib
import json
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import doc_tables
import numpy as np
import quote
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from published import OPEN_LICENSES, frontier

import dcp_zoo
from dcp_zoo.data.packaged import SAMPLE_CLASSES, sample_images
from dcp_zoo.zoo.registry import WEIGHTS
from dcp_zoo.zoo.specs import MODELS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SOURCES = IMAGES / "sources.json"
HEAD = "dcp_mini.caltech101-16shot"
OTHER = "dcp_mini.pacs_photo-16shot"


SHOWN = {  # in the plot of averages, with their colours
    "DCP": "#999999",
    "Text probe on the embedding": "#D55E00",
    "Text probe": "#0072B2",
}


def save(figure: Figure, name: str) -> None:
    """Without a date, and with ids that depend on the picture alone: drawn again, the same picture is the
    same file."""
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(IMAGES / name, metadata={"Date": None})


def averages() -> None:
    """Averages over the sets and the draws that all have: over images per class, and at four images per
    class over the CPU time of training."""
    files = "baselines+many_sets"
    found = quote.on_sets(files)["top1"][[*SHOWN]].dropna()
    figure = Figure((5.4, 6), layout="constrained")  # one above the other: side by side is too small for a phone
    top, bottom = figure.subplots(2)
    for label, color in SHOWN.items():
        means = found[label].groupby("images_per_class").mean()
        top.plot(means.index, means, marker="o", color=color, label=label)
        seconds = quote.set_mean(label, 4, "train_cpu_seconds", files)
        bottom.plot(seconds, means[4], marker="o", color=color)
        bottom.annotate(label, (seconds, means[4]), (7, -3), textcoords="offset points", fontsize=8)
    top.set(xscale="log", xlabel="images per class", ylabel="top-1, %")
    top.set_xticks(means.index, means.index.astype(str))
    bottom.set(xscale="log", xlabel="CPU seconds of training, 4 images per class", ylabel="top-1, %", xlim=(2, 100))
    bottom.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    for ax in (top, bottom):
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    top.legend(frameon=False, fontsize=8)
    save(figure, "averages.svg")


OPEN = "MIT or Apache-2.0"
EVERY = "every licence"


def models() -> None:
    """Published zero-shot accuracies over the operations of an image, and which models are best for their
    cost."""
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
            costs = [s.gflops for s in specs]
            values = [getattr(s, name) for s in specs]
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


def engines() -> None:
    """Images per second of processor time of every way to predict."""
    figure = Figure((5.4, 3.6), layout="constrained")
    for ax, model in zip(figure.subplots(2, height_ratios=(6, 3)), ("dcp_mini", "dcp_vitb16"), strict=True):
        rates = 1 / doc_tables.predictor_costs(model).seconds_per_image[::-1]
        names = [f"{way}, {count} processes" if count > 1 else way for way, count in rates.index]
        colors = ["#999999" if name == "bare loop" else "#0072B2" for name in names]
        ax.bar_label(ax.barh(names, rates, color=colors), fmt="%.1f", padding=3, fontsize=8)
        ax.set_title(model, fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel="images per second of processor time")
    save(figure, "engines.svg")


def explain() -> None:
    """Three of the packaged photographs, and beside each what speaks for its class."""
    head = dcp_zoo.create_model(HEAD, pretrained=True, classnames=SAMPLE_CLASSES)
    shown = [path for path in sample_images() if Path(path).stem in ("coffee", "osprey", "lake")]
    pictures = [np.asarray(dcp_zoo.explain(head, path).picture()) for path in shown]
    Image.fromarray(np.concatenate(pictures, 1)).save(IMAGES / "explain.webp", quality=85)


def script(path: str) -> Callable[[], None]:
    """The function `main` of a script."""
    return lambda: runpy.run_path(str(ROOT / path))["main"]()


class Picture(NamedTuple):
    draw: Callable[[], None]
    sources: Sequence[Path]


PICTURES = {
    "explain.webp": Picture(explain, [WEIGHTS / HEAD / "model.safetensors"]),
    "averages.svg": Picture(
        averages,
        [*(doc_tables.RESULTS / f"{name}.csv" for name in ("many_sets", "reads")), ROOT / "benchmarks" / "sets.py"],
    ),
    "engines.svg": Picture(engines, [doc_tables.RESULTS / "predictor.csv"]),
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
