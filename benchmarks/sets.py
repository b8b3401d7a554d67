"""The sets of images on which methods are compared: some only to choose by, the others only to report on.

DATA holds `caltech-101` in CoOp's layout, `pacs`, `tiny-imagenet-200` (parquet), and folders with an `images.parquet`
(columns image, label, use) of `oxford_flowers`, `eurosat` and `grocery_store`. Nothing is chosen on a reporting set.
PACS and Tiny ImageNet have no test images of their own: so many of each class, drawn once, are. Of Tiny ImageNet only
validation images are read, as the miniature was trained on the others.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from tuning import of_class, tiny_imagenet

from dcp_zoo.data import Item, load_split

TRAIN, TEST = 50, 70  # images of each class of PACS
TINY_TRAIN = 16  # of the 25 of Tiny ImageNet
TINY_CLASSES = 40
Pool = tuple[list[str], list[Item], list[Item]]  # class names, images to draw from, test images


def caltech(data: Path, folder: Path) -> Pool:
    split = load_split("caltech101", data)
    return split.classnames, split.train, split.test


def pacs(domain: str, data: Path, folder: Path) -> Pool:
    split = load_split(f"pacs_{domain}", data)
    items, rng = sorted(split.train + split.test), random.Random(0)
    of_each = [of_class(items, label) for label in range(len(split.classnames))]
    shuffled = [rng.sample(own, len(own)) for own in of_each]
    train = [item for own in shuffled for item in own[:TRAIN]]
    return split.classnames, train, [item for own in shuffled for item in own[TRAIN : TRAIN + TEST]]


def tiny(first: int, data: Path, folder: Path, rest: bool = False) -> Pool:
    """Classes with even labels from 0, or odd ones from 1: those drawn, or the rest."""
    drawn = random.Random(first).sample(range(first, 200, 2), TINY_CLASSES)
    labels = sorted(set(range(first, 200, 2)) - set(drawn) if rest else drawn)
    names, items = tiny_imagenet(labels, 25, data / "tiny-imagenet-200", folder, "val")
    each = [of_class(items, label) for label in range(len(labels))]
    return names, [i for own in each for i in own[:TINY_TRAIN]], [i for own in each for i in own[TINY_TRAIN:]]


def parquet(name: str, data: Path, folder: Path) -> Pool:
    table = pq.read_table(data / name / "images.parquet")
    names = sorted(set(table["label"].to_pylist()))
    parts: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    for number, (label, use) in enumerate(zip(table["label"].to_pylist(), table["use"].to_pylist(), strict=True)):
        path = folder / f"{name}-{number}.jpg"
        path.write_bytes(table["image"][number].as_py())
        parts[use].append(Item(str(path), path.name, names.index(label)))
    return names, parts["train"], parts["test"]


CHOOSING: dict[str, Callable[[Path, Path], Pool]] = {
    "PACS, art paintings": partial(pacs, "art_painting"),
    "PACS, cartoons": partial(pacs, "cartoon"),
    "Tiny ImageNet, 40 classes": partial(tiny, 0),
}
REPORTING: dict[str, Callable[[Path, Path], Pool]] = {
    "Caltech-101": caltech,
    "flowers": partial(parquet, "oxford_flowers"),
    "EuroSAT": partial(parquet, "eurosat"),
    "groceries": partial(parquet, "grocery_store"),
    "PACS, sketches": partial(pacs, "sketch"),
    "PACS, photos": partial(pacs, "photo"),
    "Tiny ImageNet, 40 others": partial(tiny, 1),
}
LAST: dict[str, Callable[[Path, Path], Pool]] = {  # they had no part in choosing the rule of `together.py`
    "Tiny ImageNet, 60 even": partial(tiny, 0, rest=True),
    "Tiny ImageNet, 60 odd": partial(tiny, 1, rest=True),
}
