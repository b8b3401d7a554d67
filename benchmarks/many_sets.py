"""The methods that a reader would choose from, on many sets of images with 1 to 16 training images per
class.

    python benchmarks/many_sets.py --data-root DATA      writes results/many_sets.csv; resumes when repeated

Methods of `QUICK` are trained on five draws at five numbers of images, those of `SLOW` on the first two draws
at two numbers: compare them with the same draws of the others. Each is measured alone, as in its paper,
without a text probe. Methods that need nothing but features are in `baselines.py`, which reads these once, and
the text probe in `reads.py`.

DATA, and which sets choose and which only report: see `sets.py`. A method that chooses hyperparameters gets
validation images besides, at most four per class as in the papers, as far as the set has more images than
are trained on; all others see K images per class.
"""

import random
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from growing import GrowingTable
from sets import REPORTING, Pool, of_class
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.cli.console import log, progress_bar
from dcp_zoo.data import Item, Split
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.training.evaluation import EVAL_BATCH, expected_calibration_error, top1
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.run import Source, plan
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.build import plain_clip

RESULTS = Path(__file__).parent / "results"
COLUMNS = "weights set classes images_per_class seed method top1 ece nll test_images train_cpu_seconds".split()
MODEL = "dcp_mini"
TEST_IMAGES = 800  # at most
VAL_IMAGES = 4  # of a class, at most
ON_FEATURES = ("zero-shot-ensemble", *(name for name, each in METHODS.items() if each.features))
RECIPES = {"dcp, paper": "paper", "dcp, release": "release"}  # where not the method's default
QUICK = ("zero-shot", "zero-shot-ensemble", "dcp", "coop", "prolip")
SLOW = ("2sfs", "vpt-deep", "maple", "promptsrc", "clip-lora", "clip-svd")
# images per class, and draws
AUTHORS = ("dcp, paper", "dcp, release")
GRID = dict.fromkeys(QUICK, ((4, 1, 16, 2, 8), range(1, 6))) | dict.fromkeys(SLOW, ((4, 16), range(1, 3)))
GRID |= dict.fromkeys(AUTHORS, ((4,), range(1, 3)))


def draw(pool: Pool, images: int, seed: int) -> Split:
    """Training images of one draw, validation images of what is left, and at most `TEST_IMAGES` test
    images."""
    names, train, test = pool
    rng = random.Random(seed * 1000 + images)
    drawn = list[Item]()
    val = list[Item]()
    for label in range(len(names)):
        own = of_class(train, label)
        own = rng.sample(own, len(own))
        drawn += own[:images]
        val += own[images : images + min(images, VAL_IMAGES)]
    return Split("folder", names, drawn, val, random.Random(0).sample(test, min(TEST_IMAGES, len(test))))


def planned(split: Split, method: str, seed: int) -> Task:
    """The task of a method, whose name is what is before a comma."""
    name = method.split(",")[0]
    classifier = None if method in ON_FEATURES else "none"
    if not METHODS[name].chooses:
        split = Split(split.name, split.classnames, split.train, [], split.test)
    run = plan(split, MODEL, name, seed=seed, recipe=RECIPES.get(method), classifier=classifier, device="cpu")
    return run.task(Source(run, progress_bar, frozen_clip()))


@cache
def frozen_clip() -> FrozenCLIP:
    return plain_clip(MODEL)


@cache
def test_images(items: tuple[Item, ...]) -> ImageLoader:
    """Read once for all fits of a set, which have the same test images."""
    images = ImageLoader(Photos(items), FeatureExtractor(frozen_clip(), progress=progress_bar))
    return images.after_stem(images.training_views)


def measured(split: Split, seed: int, method: str) -> tuple[Any, ...]:
    """Top-1 and ECE in percent, cross-entropy, test images, and CPU seconds of training."""
    started = time.process_time()
    head = fit_head(method.split(",")[0], planned(split, method, seed))
    trained = time.process_time() - started
    test = test_images(tuple(split.test))
    logits = torch.from_numpy(outputs_of_loader(head, test, EVAL_BATCH).logits)
    return *scores(logits, test.labels), round(trained, 1)


def scores(logits: Tensor, labels: Tensor) -> tuple[float, float, float, int]:
    nll = F.cross_entropy(logits, labels).item()
    return (
        round(top1(logits, labels), 2),
        round(expected_calibration_error(logits, labels), 2),
        round(nll, 4),
        len(labels),
    )


def main(data_root: Annotated[Path, typer.Option(help="Folder with the sets, see sets.py.")]) -> None:
    """Measure every set, number of images, seed and method that the table does not have for the current
    weights yet."""
    table = GrowingTable(RESULTS / "many_sets.csv", COLUMNS, COLUMNS[:2] + COLUMNS[3:6])
    weights = weights_id(MODEL)
    cells = [(seed, n, m, name) for m, (ns, seeds) in GRID.items() for seed in seeds for n in ns for name in REPORTING]
    left = [(seed, n, m, name) for seed, n, m, name in cells if (weights, name, n, seed, m) not in table]
    left.sort(key=lambda cell: cell[0])
    log(f"{len(left)} of {len(cells)} fits are left.")
    with TemporaryDirectory() as folder:
        pools = {name: REPORTING[name](data_root, Path(folder)) for name in {cell[3]: None for cell in left}}
        for seed, number, method, name in left:
            head = weights, name, len(pools[name][0]), number, seed, method
            table.add([(*head, *measured(draw(pools[name], number, seed), seed, method))])


if __name__ == "__main__":
    typer.run(main)
