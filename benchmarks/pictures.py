"""Keeps the documentation's pictures equal to what they show.

    python benchmarks/pictures.py     draws again those whose sources have changed

`docs/images/sources.json` has the hash of the files that each picture was drawn from. Not among them are the charts of
benchmarks/speed.py and the screenshots of hub/walk_pictures.py, hub/demo_picture.py and
hub/label_studio/check.py, which need Chromium.
"""

import hashlib
import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import doc_tables
import quote
from matplotlib.figure import Figure

import dcp_zoo
from dcp_zoo.api.explain import coupling_moves, draw
from dcp_zoo.zoo.registry import WEIGHTS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SOURCES = IMAGES / "sources.json"
HEAD, OTHER = "dcp_mini.caltech101-16shot", "dcp_mini.pacs_photo-16shot"


SHOWN = {  # in the plot of averages, with their colours
    "Linear probe": "#999999",
    "LP++": "#56B4E9",
    "GDA": "#009E73",
    "Text probe": "#0072B2",
    "DCP + text probes": "#D55E00",
}


def averages() -> None:
    """Averages over the sets: over images per class, and at four images per class over the CPU time of training."""
    found = quote.on_sets()
    figure = Figure((5.4, 6), layout="constrained")  # one above the other: side by side is too small for a phone
    top, bottom = figure.subplots(2)
    for label, color in SHOWN.items():
        means = found["top1"][label].groupby("images_per_class").mean()
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
    figure.savefig(IMAGES / "averages.svg")


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
    figure.savefig(IMAGES / "reads.svg")


def explained() -> None:
    model = dcp_zoo.create_model(HEAD, pretrained=True).eval()
    draw(coupling_moves(model), IMAGES / "explained.png", f"{HEAD}: how far CMPA moves the prompts")


def script(path: str) -> Callable[[], None]:
    """The function `main` of a script."""
    return lambda: runpy.run_path(str(ROOT / path))["main"]()


class Picture(NamedTuple):
    draw: Callable[[], None]
    sources: Sequence[Path]


PICTURES = {
    "averages.svg": Picture(averages, [doc_tables.RESULTS / "many_sets.csv", ROOT / "benchmarks" / "sets.py"]),
    "reads.svg": Picture(reads, [doc_tables.RESULTS / "reads.csv", ROOT / "benchmarks" / "sets.py"]),
    "explained.png": Picture(explained, [WEIGHTS / HEAD / "model.safetensors"]),
    "predictions.png": Picture(
        script("hub/predictions.py"), [WEIGHTS / head / "model.safetensors" for head in (HEAD, OTHER)]
    ),
    "scaling.svg": Picture(script("benchmarks/scaling.py"), [doc_tables.RESULTS / "scaling_simulated.csv"]),
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
