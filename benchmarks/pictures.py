"""Keeps the documentation's pictures equal to what they show.

    python benchmarks/pictures.py     draws again those whose sources have changed

`docs/images/sources.json` has the hash of the files that each picture was drawn from. Not among them are the charts of
benchmarks/speed.py and the screenshots of hub/inspection_picture.py and hub/demo_picture.py, which need Chromium.
"""

import hashlib
import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import doc_tables

import dcp_zoo
from dcp_zoo.api.explain import coupling_moves, draw
from dcp_zoo.benchmark.report.write import LearningCurves
from dcp_zoo.zoo.registry import WEIGHTS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SOURCES = IMAGES / "sources.json"
HEAD = "dcp_mini.caltech101-16shot"


def curves() -> None:
    (IMAGES / "curves.svg").write_text(LearningCurves(doc_tables.unchanged(doc_tables.labelled("few-shot"))).file())


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
    "curves.svg": Picture(curves, [doc_tables.RESULTS / "few-shot.csv"]),
    "explained.png": Picture(explained, [WEIGHTS / HEAD / "model.safetensors"]),
    "predictions.png": Picture(script("hub/predictions.py"), [WEIGHTS / HEAD / "model.safetensors"]),
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
