"""Measure a miniature CLIP: `python hub/recipes/miniature/measure.py --help`."""

import csv
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from clip_names import agreement, read_clip_names
from images import cache_features, load_images
from train import RECIPES, name_features, zero_shot_accuracy

from dcp_zoo.backbone import MINI_CFG, MINI_WEIGHTS
from dcp_zoo.backbone.mini import build_mini_clip

REPEATS = 40


@torch.inference_mode()
def main(
    images: Annotated[Path, typer.Option(help="As in train.py; the validation images are used.")],
    cache: Annotated[Path, typer.Option(help="Folder for the stem's features of the validation images.")],
    csv_file: Annotated[Path, typer.Option("--csv", help="Output file.")],
    clip_text: Annotated[Path, typer.Option(help="As in train.py; its held-out names are used.")],
    weights: Annotated[Path, typer.Option(help="Weights to measure. Default: the bundled ones.")] = MINI_WEIGHTS,
) -> None:
    """Measure zero-shot accuracy on the recipe's validation images, how close held-out names come to CLIP's
    vectors, time per image on one core, size and logit scale.

    For Caltech-101, use `dcp-zoo benchmark`.
    """
    torch.set_num_threads(1)
    clip = build_mini_clip(weights).eval()
    pixels, labels, names = load_images(images, "val", RECIPES["full"].pixels)
    size = MINI_CFG["image_size"]
    maps = cache_features(pixels, clip.visual.conv1.stem, size, 1, cache, f"val-{weights.stat().st_mtime_ns}")
    top1 = 100 * zero_shot_accuracy(clip, maps, labels, names)
    names_of_clip = read_clip_names(clip_text)
    held_out = agreement(name_features(clip, names_of_clip.held_out), names_of_clip)
    rows = [
        (f"{images.name}, {len(names)} classes, zero-shot", "top-1 %", round(top1, 1), len(labels)),
        ("one image, one core, float32", "ms", round(1000 * seconds_per_image(clip, size), 1), REPEATS),
        ("logit scale", "", round(clip.logit_scale.exp().item(), 1), 1),
        ("weights in float16", "MB", round(weights.stat().st_size / 1e6, 1), 1),
    ]
    rows += [(f"held-out names, {what}", "", round(x, 3), len(names_of_clip.held_out)) for what, x in held_out.items()]
    with csv_file.open("w", newline="") as file:
        csv.writer(file).writerows([("what", "unit", "value", "samples"), *rows])
    for row in rows:
        typer.echo("  ".join(map(str, row)))


def seconds_per_image(clip: torch.nn.Module, size: int) -> float:
    """Median time to encode one image."""
    image = torch.randn(1, 3, size, size)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        clip.encode_image(image)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


if __name__ == "__main__":
    typer.run(main)
