"""Choose recipes for the miniature on validation images, on sets of few and many, similar and different classes.

    python benchmarks/tuning.py --data-root DATA

DATA holds `caltech-101` in CoOp's layout, `pacs/photo` and `tiny-imagenet-200` (parquet). Of Tiny ImageNet only
training images are read, of the others only training and validation images. `results/tuning.csv` identifies the
weights of each row; rows of the current weights are not measured again. Rows without steps are from an earlier recipe
of 20 epochs, tested on 1,200 validation images.
"""

import csv
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
from torch.nn import functional as F

from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.cli.console import log, progress_bar
from dcp_zoo.data import Item, load_split
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.training.evaluation import EVAL_BATCH, predict, top1
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.recipes import batch_sizes
from dcp_zoo.training.sources import image_source
from dcp_zoo.zoo.factory import plain_clip

RESULTS = Path(__file__).parent / "results" / "tuning.csv"
COLUMNS = ("weights", "method", "set", "changes", "steps", "top1", "top1_train", "loss_train")
MODEL, SEED = "dcp_mini", 1
VALIDATION_IMAGES = 400


@dataclass(frozen=True)
class ImageSet:
    """Classes of a dataset, and how many training images of each: all its classes, or these labels."""

    dataset: str
    shots: int
    labels: tuple[int, ...] = ()


def drawn(count: int, of: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(random.Random(0).sample(of, count)))


EVEN = range(0, 200, 2)  # Tiny ImageNet's other classes are left for checks of the recipe
SETS = {
    "9 pets x 8": ImageSet("tiny-imagenet-200", 8, tuple(range(24, 33))),
    "50 classes x 8": ImageSet("tiny-imagenet-200", 8, drawn(50, EVEN)),
    "10 digits x 4": ImageSet("digits", 4),
    "2 cats x 4": ImageSet("tiny-imagenet-200", 4, (33, 34)),
    "5 objects x 10": ImageSet("caltech101", 10, drawn(5, range(100))),
    "7 photo classes x 10": ImageSet("pacs_photo", 10),
    "20 classes x 50": ImageSet("tiny-imagenet-200", 50, drawn(20, EVEN)),
    "100 objects x 4": ImageSet("caltech101", 4),
}


@dataclass(frozen=True)
class Choice:
    """Changes to a method's recipe, and for DCP optimiser steps; None: the recipe's own schedule."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    sets: Sequence[str] = tuple(SETS)
    method: str = "dcp"

    def key(self, name: str) -> tuple[Any, ...]:
        """Identifies its row for a set."""
        changes = ",".join(f"{option}={value}" for option, value in self.changes.items())
        return weights_id(MODEL), self.method, name, changes, self.steps or ""


MANY = ("100 objects x 4", "50 classes x 8")
CHOICES = (
    Choice(steps=100, sets=("2 cats x 4", "5 objects x 10", "9 pets x 8")),
    Choice(steps=200, sets=("9 pets x 8",)),
    Choice(steps=300, sets=("50 classes x 8",)),
    Choice(steps=600, sets=("50 classes x 8",)),
    Choice({"lr": 4e-3}, 300, ("50 classes x 8",)),
    Choice(steps=100, sets=("10 digits x 4", "7 photo classes x 10")),
    Choice(steps=200, sets=("10 digits x 4", "7 photo classes x 10")),
    Choice(steps=700, sets=("100 objects x 4",)),
    *(Choice({"lr": lr}, sets=MANY, method="prolip") for lr in (1e-5, 1e-4, 1e-3, 1e-2)),
    *(Choice({"lr": lr, "steps": 400}, sets=MANY, method="clip-lora") for lr in (2e-4, 1e-3, 4e-3, 1e-2)),
    *(Choice({"lr": lr, "steps": 600}, sets=MANY, method="2sfs") for lr in (2e-4, 1e-3)),
)


class GrowingTable:
    """A CSV file that grows while a script measures, so that the script resumes where it was stopped.

    Args:
        path: of the file; created if needed.
        columns: its header.
        key: the columns that say what a row measured.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        self.path = path
        if not path.is_file():
            self._append([columns])
        with path.open() as file:
            self.known = {tuple(row[name] for name in key) for row in csv.DictReader(file)}

    def __contains__(self, key: Sequence[Any]) -> bool:
        return tuple(map(str, key)) in self.known

    def add(self, rows: Iterable[Sequence[Any]]) -> None:
        """Write the rows, once all of them are measured, and show them."""
        rows = list(rows)
        self._append(rows)
        log("\n".join(" ".join(map(str, row)) for row in rows))

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def main(data_root: Annotated[Path, typer.Option(help="Folder with caltech-101, pacs and tiny-imagenet-200.")]) -> None:
    """Measure every choice that `results/tuning.csv` does not have for the current weights yet."""
    table, clip = GrowingTable(RESULTS, COLUMNS, COLUMNS[:5]), plain_clip(MODEL)
    with TemporaryDirectory() as folder:
        for name, images in SETS.items():
            task = None
            for each in (each for each in CHOICES if name in each.sets):
                if (key := each.key(name)) not in table:
                    task = task or tasks(images, clip, data_root, Path(folder))
                    table.add([(*key, *measured(each, images.shots, *task))])


def tasks(images: ImageSet, clip: FrozenCLIP, data_root: Path, folder: Path) -> tuple[Task, Any]:
    """The training task of a set, without a recipe, and the source of its validation images."""
    if images.dataset == "tiny-imagenet-200":
        names, items = tiny_imagenet(images.labels, images.shots + 40, data_root / images.dataset, folder)
        train = [item for label in range(len(names)) for item in of_class(items, label)[: images.shots]]
        val = sorted({*items} - {*train})
    else:
        split = load_split(images.dataset, data_root)
        labels = images.labels or range(len(split.classnames))
        names = [split.classnames[label] for label in labels]
        train, val = (relabelled(part, labels) for part in (split.train, split.val))
        train = [item for label in range(len(names)) for item in sample(of_class(train, label), images.shots)]
    log(f"{len(names)} classes, {len(train)} training images: {', '.join(names)}")
    source = image_source(clip, train, "flip", progress=progress_bar)
    validation = image_source(clip, sample(val, VALIDATION_IMAGES), progress=progress_bar)
    return Task(clip, MODEL, names, "a photo of a {}.", source, None, None, SEED, progress=progress_bar), validation


def relabelled(items: list[Item], labels: Sequence[int]) -> list[Item]:
    """The items of these labels, as classes 0, 1, ..."""
    new = {label: i for i, label in enumerate(labels)}
    return [item._replace(label=new[item.label]) for item in items if item.label in new]


def of_class(items: list[Item], label: int) -> list[Item]:
    return [item for item in items if item.label == label]


def sample(items: list[Item], count: int, seed: int = SEED) -> list[Item]:
    return random.Random(seed).sample(items, min(count, len(items)))


def tiny_imagenet(
    labels: Sequence[int], count: int, parquet: Path, folder: Path, part: str = "train"
) -> tuple[list[str], list[Item]]:
    """Class names, and the first `count` images of each class, whose files are written into `folder`."""
    table = json.loads((parquet / "classes.json").read_text())
    found: dict[int, list[Item]] = {label: [] for label in labels}
    for file in sorted(parquet.glob(f"{part}-*.parquet")):
        images = pq.read_table(file)
        for number, label in enumerate(images["label"].to_pylist()):
            if label in found and len(found[label]) < count:
                path = folder / f"{file.stem}-{number}.webp"
                path.write_bytes(images["image"][number].as_py())
                found[label].append(Item(str(path), path.name, labels.index(label)))
    return [table[label]["name"] for label in labels], [item for items in found.values() for item in items]


def measured(each: Choice, shots: int, task: Task, validation: Any) -> list[float]:
    """Top-1 in percent on the validation and on the training images, and the loss on the training images; for DCP
    without the text probe, which is fitted after training."""
    without_probe = {"classifier": "none"} if each.method == "dcp" else {}
    recipe: Any = (
        METHODS[each.method].recipe(MODEL, "folder", shots, "few-shot").updated({**without_probe, **each.changes})
    )
    assert task.train is not None
    if each.steps:
        per_epoch = len(batch_sizes(len(task.train.items), recipe.batch_size, recipe.drop_last))
        recipe = recipe.updated({"epochs": -(-each.steps // per_epoch)})
    task.recipe = recipe
    head = fit_head(each.method, task)
    train, val = (predict(head, source, EVAL_BATCH) for source in (task.plain_train, validation))
    loss = F.cross_entropy(train, task.train.labels).item()
    return [top1(val, validation.labels), top1(train, task.train.labels), round(loss, 3)]


if __name__ == "__main__":
    typer.run(main)
