"""Time of the miniature's frozen stem, in parts that stay in the CPU's cache and on the whole batch at once.

    python benchmarks/stem.py      writes results/stem.csv

Batches of 64 images on one thread, both ways in turn; milliseconds of processor time per image, and their ratio.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor

from dcp_zoo.model.config import MINI_CFG, MINI_WEIGHTS
from dcp_zoo.model.mini import build_mini_clip

RESULTS = Path(__file__).parent / "results" / "stem.csv"
IMAGES, TURNS = 64, 7


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    stem = build_mini_clip(MINI_WEIGHTS).eval().visual.conv1.stem
    images = torch.randn(IMAGES, 3, MINI_CFG["image_size"], MINI_CFG["image_size"])
    ways = {"in parts": stem, "at once": lambda x: stem.widen(stem.features(x))}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            times[name].append(milliseconds(way, images))
    values = {name: median(found) for name, found in times.items()}
    ratio = values["in parts"] / values["at once"]
    rows = [*((f"stem, {name}, ms per image", round(value, 1)) for name, value in values.items()), ("ratio", ratio)]
    pd.DataFrame(rows, columns=["what", "value"]).round(2).to_csv(RESULTS, index=False)
    print(RESULTS.read_text(), end="")


def milliseconds(way: Callable[[Tensor], Tensor], images: Tensor) -> float:
    started = time.process_time()
    way(images)
    return 1000 * (time.process_time() - started) / len(images)


if __name__ == "__main__":
    main()
