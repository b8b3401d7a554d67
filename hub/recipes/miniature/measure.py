"""Measure a miniature CLIP: `python hub/recipes/miniature/measure.py --help`."""

import csv
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from images import cache_features, load_images
from train import RECIPES, accuracy_by_names

from dcp_zoo.model.mini import MINI_CFG, MINI_WEIGHTS, build_mini_clip

REPEATS = 40


@torch.inference_mode()
def main(
    images: Annotated[Path, typer.Option(help="As for train.py; its validation images are used.")],
    cache: Annotated[Path, typer.Option(help="Folder for the stem's features of the validation images.")],
    csv_file: Annotated[Path, typer.Option("--csv", help="Where the figures go.")],
    weights: Annotated[Path, typer.Option(help="Weights to measure; the bundled ones by default.")] = MINI_WEIGHTS,
) -> None:
    """Zero-shot accuracy on the recipe's validation images, time of an image on one core, size and logit scale.

    Figures on Caltech-101 come from `dcp-zoo benchmark`.
    """
    torch.set_num_threads(1)
    clip = build_mini_clip(weights).eval()
    pixels, labels, names = load_images(images, "val", RECIPES["full"].pixels)
    size = MINI_CFG["image_size"]
    maps = cache_features(pixels, clip.visual.conv1.stem, size, 0, cache, f"val-{weights.stat().st_mtime_ns}")
    top1 = 100 * accuracy_by_names(clip, maps, labels, names)
    rows = [
        (f"{images.name}, {len(names)} classes by name", "top-1 %", round(top1, 1), len(labels)),
        ("one image, one core, float32", "ms", round(1000 * seconds_per_image(clip, size), 1), REPEATS),
        ("logit scale", "", round(clip.logit_scale.exp().item(), 1), 1),
        ("weights in float16", "MB", round(weights.stat().st_size / 1e6, 1), 1),
    ]
    with csv_file.open("w", newline="") as file:
        csv.writer(file).writerows([("what", "unit", "value", "samples"), *rows])
    for row in rows:
        typer.echo("  ".join(map(str, row)))


def seconds_per_image(clip: torch.nn.Module, size: int) -> float:
    """Median time of one image's features."""
    image, seconds = torch.randn(1, 3, size, size), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        clip.encode_image(image)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


if __name__ == "__main__":
    typer.run(main)
