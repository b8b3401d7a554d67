"""The sets of images on which methods are compared, and what each has influenced.

No method is chosen, and no recipe, on a set of `REPORTING`; `CHOOSING` are for that. `MINIATURES` are
neither: the miniature was trained on other images of these classes, with their labels, so that they say
nothing of new classes.

DATA holds `caltech-101` in CoOp's layout, `pacs`, `tiny-imagenet-200` (parquet), and folders with an
`images.parquet` (columns image, label, use) of the others. PACS and Tiny ImageNet have no test images of
their own: so many of each class, drawn once, are. Of Tiny ImageNet only validation images are read.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from dcp_zoo.data import Item, load_split

TRAIN = 50  # images of each class of PACS
TEST = 70
TINY_TRAIN = 16  # of the 25 of Tiny ImageNet
TINY_CLASSES = 40
Pool = tuple[list[str], list[Item], list[Item]]  # class names, images to draw from, test images


def of_class(items: list[Item], label: int) -> list[Item]:
    return [item for item in items if item.label == label]


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


def caltech(data: Path, folder: Path) -> Pool:
    split = load_split("caltech101", data)
    return split.classnames, split.train, split.test


def pacs(domain: str, data: Path, folder: Path) -> Pool:
    split = load_split(f"pacs_{domain}", data)
    items = sorted(split.train + split.test)
    rng = random.Random(0)
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


@dataclass(frozen=True)
class ImageSet:
    """What makes a set's pool from DATA and a folder for files, and what the set has influenced, in
    words."""

    pool: Callable[[Path, Path], Pool]
    influenced: str

    def __call__(self, data: Path, folder: Path) -> Pool:
        return self.pool(data, folder)


TOGETHER = "constants of `--together`, which {} when this set is left out"
SEEN = "that richer features help was seen here first, no constant"
COPIES = "that near copies must agree in more of their details (0.85, not 0.7)"
BOUND = "that the bound of evidence between families was chosen again (64 images, not 16)"
UNSURE = "that the gate was chosen again (its ECE)"
SHIFT = "the recipe for domain shift, the limits of the gate (test images)"
PROBE = "the text probe, how two of them are joined, the score of rejection"
CLIP = "with features of ViT-B/32: the score of rejection, the rule for examples of none"
LINEAR = "the linear probe's C and scale, the threshold after corrections"
PAINTED = f"{PROBE}, {LINEAR}, what `inspect` judges by, the form of `--together`; {SHIFT}"
PHOTOS = f"recipes, the text probe, {LINEAR}, thresholds of `inspect`"
TRAINED = "the miniature was trained on other images of these classes"
REPORTING = {
    "flowers": ImageSet(partial(parquet, "oxford_flowers"), f"{TOGETHER.format('stay')}; {CLIP}; {UNSURE}"),
    "EuroSAT": ImageSet(partial(parquet, "eurosat"), f"{TOGETHER.format('stay')}; {SEEN}; {BOUND}"),
    "groceries": ImageSet(partial(parquet, "grocery_store"), f"{TOGETHER.format('change')}; {SEEN}"),
    "PACS, sketches": ImageSet(
        partial(pacs, "sketch"), f"{TOGETHER.format('stay')}; how `search --to-label` suggests images; {SHIFT}; {SEEN}"
    ),
    "scenes": ImageSet(partial(parquet, "fifteen_scenes"), SEEN),
    "hand signs": ImageSet(partial(parquet, "hand_signs"), f"{SEEN}; {COPIES}"),
    "corn leaves": ImageSet(partial(parquet, "corn_leaves"), f"{SEEN}; {BOUND}"),
}
CHOOSING = {
    "PACS, art paintings": ImageSet(partial(pacs, "art_painting"), PAINTED),
    "PACS, cartoons": ImageSet(partial(pacs, "cartoon"), PAINTED),
    "PACS, photos": ImageSet(partial(pacs, "photo"), PHOTOS),
    "Caltech-101": ImageSet(caltech, f"{PHOTOS}; DCP's rate and Tip-Adapter's range (test images)"),
}
MINIATURES = {
    "Tiny ImageNet, 40 classes": ImageSet(partial(tiny, 0), f"{TRAINED}; {PROBE}"),
    "Tiny ImageNet, 40 others": ImageSet(partial(tiny, 1), TRAINED),
    "Tiny ImageNet, 60 even": ImageSet(partial(tiny, 0, rest=True), TRAINED),
    "Tiny ImageNet, 60 odd": ImageSet(partial(tiny, 1, rest=True), TRAINED),
}
SETS = {**REPORTING, **CHOOSING, **MINIATURES}
