"""The accuracy that `train` reports without test images, by folds of the training images, beside that on
other images.

    python benchmarks/told.py --data-root DATA       writes results/told.csv; resumes when repeated

DATA is as in `sets.py`. Groups of photographs that were taken together are found in each set as `train`
finds them, and no other image is in a group of a training image.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from growing import GrowingTable
from many_sets import draw
from sets import CHOOSING, REPORTING

from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Item, Split
from dcp_zoo.features.cache import kept_features
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.groups import group_images
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.progress import no_progress
from dcp_zoo.training.evaluation import Evaluation, measure
from dcp_zoo.training.run import RunOptions, plan, train_head
from dcp_zoo.zoo.build import plain_clip

RESULTS = Path(__file__).parent / "results" / "told.csv"
COLUMNS = ("weights", "set", "images_per_class", "seed", "told", "low", "high", "tested", "top1", "others")
MODEL = "dcp_mini"
IMAGES = (2, 4, 8)
SEEDS = range(1, 7)


def with_groups(items: list[Item]) -> list[Item]:
    """The items of a set with their groups."""
    images = ImageLoader(Photos(items, facts={}), FeatureExtractor(plain_clip(MODEL)))
    return group_images([images])


def measured(split: Split, others: list[Item], seed: int) -> tuple[float | str, ...]:
    """What is reported of a head, and its accuracy on other images."""
    shown: list[Evaluation] = []
    options = RunOptions(progress=no_progress, show=shown.append)
    run = plan(split, MODEL, "text-probe", seed=seed, device="cpu")
    head, _ = train_head(run, None, options, by_folds=True)
    told = shown[0].accuracy
    images = ImageLoader(Photos(others), FeatureExtractor(head.frozen))
    metrics, _ = measure(head, images, all_modes=False)
    low, high = told.interval
    top1 = next(iter(metrics.values()))
    return round(told.percent, 2), round(low, 2), round(high, 2), told.images, top1, len(others)


def main(data_root: Annotated[Path, typer.Option(help="Folder with the sets, see sets.py.")]) -> None:
    """Measure every set, number of images and seed that the table does not have for the current weights
    yet."""
    torch.set_num_threads(1)
    table = GrowingTable(RESULTS, COLUMNS, COLUMNS[:4])
    with TemporaryDirectory() as folder, kept_features():
        for name, image_set in (REPORTING | CHOOSING).items():
            left = [(images, seed) for images in IMAGES for seed in SEEDS]
            left = [pair for pair in left if (weights_id(MODEL), name, *pair) not in table]
            if not left:
                continue
            names, train, test = image_set(data_root, Path(folder))
            items = with_groups(train + test)
            pool = names, items[: len(train)], items[len(train) :]
            for images, seed in left:
                drawn = draw(pool, images, seed)
                split = Split("folder", names, drawn.train)
                trained = {item.group for item in drawn.train if item.group}
                keys = {item.key for item in drawn.train}
                others = [item for item in items if item.key not in keys and item.group not in trained]
                row = measured(split, others, seed)
                table.add([(weights_id(MODEL), name, images, seed, *row)])


if __name__ == "__main__":
    typer.run(main)
