"""`dcp-zoo train` with all its defaults against the baselines, on folders of images like a user's own.

    python benchmarks/folders.py --data-root DATA      writes results/folders.csv; resumes when repeated

DATA holds `caltech-101` in CoOp's layout, `pacs` and `tiny-imagenet-200` (parquet). DCP's recipe was chosen on none of
these images: see `tuning.py`. Every row is one draw of training images; as in a folder of one's own there are no
validation images. Of Tiny ImageNet only validation images are read, as the miniature was trained on the others.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from tuning import GrowingTable, of_class, relabelled, tiny_imagenet

from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import Item, Split, load_split
from dcp_zoo.training.evaluation import EVAL_BATCH, expected_calibration_error, predict, top1
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.run import Run, RunOptions, train_head
from dcp_zoo.training.sources import image_source
from dcp_zoo.zoo.factory import plain_clip

RESULTS = Path(__file__).parent / "results" / "folders.csv"
COLUMNS = ("weights", "set", "classes", "images_per_class", "seed", "method", "top1", "ece", "test_images", "seconds")
MODEL, SEEDS = "dcp_mini", (1, 2, 3)
BASELINES = ("zero-shot", "linear-probe", "tip-adapter", "gda", "lp-plus-plus", "clap", "text-probe")
TEST_IMAGES = 800  # at most
TINY = "tiny-imagenet-200"


@dataclass(frozen=True)
class Folder:
    """The classes `labels` of a dataset, all for None or so many drawn ones, with so many training images each."""

    dataset: str
    images: int
    labels: range | int | None = None


FOLDERS = {
    "7 classes of art paintings": Folder("pacs_art_painting", 16),
    "7 classes of cartoons": Folder("pacs_cartoon", 16),
    "7 classes of sketches": Folder("pacs_sketch", 50),
    "5 kinds of objects": Folder("caltech101", 20, 5),
    "20 kinds of objects": Folder("caltech101", 8, 20),
    "100 kinds of objects": Folder("caltech101", 4),
    "10 insects": Folder(TINY, 10, range(36, 46)),
    "50 kinds of things": Folder(TINY, 8, 50),
}


def main(data_root: Annotated[Path, typer.Option(help="Folder with caltech-101, pacs and tiny-imagenet-200.")]) -> None:
    """Measure every folder, seed and method that `results/folders.csv` does not have for the current weights yet."""
    table = GrowingTable(RESULTS, COLUMNS, ("weights", "set", "seed", "method"))
    with TemporaryDirectory() as images:
        for name, folder in FOLDERS.items():
            for seed in SEEDS:
                methods = [m for m in ("dcp", *BASELINES) if (weights_id(MODEL), name, seed, m) not in table]
                if methods:
                    split = draw(folder, data_root, Path(images), seed)
                    head = weights_id(MODEL), name, len(split.classnames), folder.images, seed
                    table.add((*head, *row) for row in measured(split, seed, methods))


def draw(folder: Folder, data_root: Path, images: Path, seed: int) -> Split:
    """Training images of one draw, and test images: the dataset's own, or those that are left."""
    rng = random.Random(seed)
    if folder.dataset == TINY:
        chosen = sorted(rng.sample(range(200), folder.labels)) if isinstance(folder.labels, int) else folder.labels
        names, items = tiny_imagenet(chosen, 25, data_root / TINY, images, "val")
        train = test = items
    else:
        split = load_split(folder.dataset, data_root)
        count = folder.labels or len(split.classnames)
        chosen = sorted(rng.sample(range(len(split.classnames)), count))
        names = [split.classnames[label] for label in chosen]
        train, test = relabelled(split.train or split.test, chosen), relabelled(split.test, chosen)  # PACS has no parts
    drawn = [item for label in range(len(names)) for item in _draw(train, label, folder.images, rng)]
    rest = sorted({*test} - {*drawn})
    return Split("folder", names, drawn, [], rng.sample(rest, min(TEST_IMAGES, len(rest))))


def _draw(items: list[Item], label: int, count: int, rng: random.Random) -> list[Item]:
    own = of_class(items, label)
    return rng.sample(own, min(count, len(own)))


def measured(split: Split, seed: int, methods: list[str]) -> Iterator[tuple[Any, ...]]:
    """Method, top-1 and ECE in percent, test images, and seconds of training, for each method."""
    per_class = len(split.train) // len(split.classnames)
    test = image_source(plain_clip(MODEL), split.test, progress=progress_bar)
    for name in methods:
        started = time.perf_counter()
        recipe = METHODS[name].recipe(MODEL, split.name, per_class, "few-shot")
        run = Run(MODEL, split, None, seed, recipe, torch.device("cpu"), name)
        head, _ = train_head(run, None, RunOptions(test=False, progress=progress_bar))
        logits = predict(test.for_model(head), EVAL_BATCH)
        seconds = round(time.perf_counter() - started, 1)
        yield name, top1(logits, test.labels), expected_calibration_error(logits, test.labels), len(test.items), seconds


if __name__ == "__main__":
    typer.run(main)
