"""The figures of docs/speed.md, from the rows of speed.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

RESULTS = Path(__file__).parent / "results"
LARGE = "dcp_vitb16"  # the model in the statements


class Run(NamedTuple):
    """The rows of a CSV file, and the machine's description from the JSON file next to it."""

    rows: pd.DataFrame
    machine: dict[str, Any]


def runs() -> list[Run]:
    """The last run, and those of other machines, `speed-MACHINE.csv` and .json."""
    files = [RESULTS / "speed.csv", *sorted(RESULTS.glob("speed-*.csv"))]
    return [Run(pd.read_csv(file), json.loads(file.with_suffix(".json").read_text())) for file in files]


class Figures:
    """Look-ups in the rows; values that were not measured, and results computed from them, are NaN."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows

    def inference(self, variant: str, classes: int = 100, column: str = "seconds") -> float:
        return self._figure("inference", variant, classes, 16, column)

    def training(self, variant: str, classes: int = 100, column: str = "seconds") -> float:
        return self._figure("training", variant, classes, 4, column)

    def _figure(self, task: str, variant: str, classes: int, batch: int, column: str) -> float:
        r = self.rows
        found = r[(r.task == task) & (r.model == LARGE) & (r.variant == variant)]
        found = found[(found.classes == classes) & (found.batch == batch)]
        return float(found[column].iloc[0]) if len(found) else float("nan")


def slope(f: Figures, variant: str, few: int, many: int) -> float:
    return (f.training(variant, many) - f.training(variant, few)) / (many - few)


class Statement(NamedTuple):
    text: str
    value: Callable[[Figures], float]
    unit: str = "x"


STATEMENTS = (
    Statement(
        "Fused inference, 100 classes, against `encode_image`",
        lambda f: f.inference("fused", 100) / f.inference("encode_image", 100),
    ),
    Statement(
        "Fused inference, 1,000 classes: faster than plain",
        lambda f: f.inference("plain", 1000) / f.inference("fused", 1000),
    ),
    Statement(
        "ONNX Runtime against fused in torch, 100 classes",
        lambda f: f.inference("onnxruntime", 100) / f.inference("fused", 100),
    ),
    Statement(
        "Peak memory of the fused model against the image tower alone",
        lambda f: f.inference("fused", 100, "peak_mb") / f.inference("encode_image", 100, "peak_mb"),
    ),
    Statement("Training step, 100 classes: faster than plain", lambda f: f.training("plain") / f.training("ours")),
    Statement(
        "The same, with bfloat16: faster than plain in float32",
        lambda f: f.training("plain") / f.training("ours-bfloat16"),
    ),
    Statement(
        "Training step, 1,000 classes: peak memory", lambda f: f.training("ours", 1000, column="peak_mb") / 1000, "GB"
    ),
    Statement("Training step, 1,000 classes against 10", lambda f: f.training("ours", 1000) / f.training("ours", 10)),
    Statement(
        "Each additional class in a training step (ours 10 to 1,000, plain 10 to 100): faster than plain",
        lambda f: slope(f, "plain", 10, 100) / slope(f, "ours", 10, 1000),
    ),
)
