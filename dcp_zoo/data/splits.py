"""Datasets (`Split`, `Item`), and what is drawn from them: few-shot subsets and base/new classes."""

import hashlib
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from dcp_zoo.errors import ZooError

PARTS = ("train", "val", "test")
DIGITS = "digits://"  # scikit-learn's digits are in memory: the path digits://17 is image number 17


class Item(NamedTuple):
    """One labelled image. `path` is opened by `load_image`, and may be an image of PIL; `key` is the path as listed in
    the split, the same on every machine, and is hashed; `label` indexes the split's class names."""

    path: Any
    key: str
    label: int


@dataclass(frozen=True)
class Split:
    """The images of a dataset in three parts, in the order of the split file.

    `val` may be empty. `note` is a sentence for the user if the split was created here instead of given, else "".
    `held_out` tells whether the test images were taken from images that came without a test part.
    """

    name: str
    classnames: list[str]
    train: list[Item]
    val: list[Item]
    test: list[Item]
    note: str = ""
    held_out: bool = False

    def __repr__(self) -> str:
        sizes = f"{len(self.train)}/{len(self.val)}/{len(self.test)}"
        return f"Split({self.name!r}, {len(self.classnames)} classes, train/val/test {sizes})"

    @property
    def items(self) -> list[Item]:
        """All images: train, val, test."""
        return self.train + self.val + self.test

    @cached_property
    def sha256(self) -> str:
        """Hash of the contents, independent of the root folder and the split file's formatting: of one line
        `part<TAB>key<TAB>label<TAB>classname` for every image of train, then val, then test."""
        digest = hashlib.sha256()
        for part in PARTS:
            for item in getattr(self, part):
                digest.update(f"{part}\t{item.key}\t{item.label}\t{self.classnames[item.label]}\n".encode())
        return digest.hexdigest()


def subset_sha256(items: Iterable[Item]) -> str:
    """Hash of a list of images: sha256 of their keys joined by newlines."""
    return hashlib.sha256("\n".join(item.key for item in items).encode()).hexdigest()


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """The few-shot subset that CoOp, MaPLe and DCP draw for this seed: `shots` images per class from train, then
    min(shots, 4) from val; test is unchanged. A class with fewer images contributes all of them, with a warning.

    Classes are drawn in order of first appearance, and val continues train's random stream, so both affect which
    images are drawn. Raises ZooError for shots < 1 and for a class without a training image.
    """
    if shots < 1:
        raise ZooError(f"shots must be 1 or more, not {shots}.")
    _check_class_sizes(split, shots)
    rng = random.Random(seed)
    train = _draw(split.train, shots, rng)
    return replace(split, train=train, val=_draw(split.val, min(shots, 4), rng))


def _draw(items: list[Item], shots: int, rng: random.Random) -> list[Item]:
    drawn: list[Item] = []
    for group in _by_label(items).values():
        drawn += rng.sample(group, shots) if len(group) >= shots else group
    return drawn


def _by_label(items: list[Item]) -> dict[int, list[Item]]:
    """Items by label, labels in order of first appearance."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def _check_class_sizes(split: Split, shots: int) -> None:
    groups = _by_label(split.train)
    sizes = {name: len(groups.get(label, [])) for label, name in enumerate(split.classnames)}
    empty = [name for name, size in sizes.items() if size == 0]
    if empty:
        raise ZooError(f"{split.name}: no training image for {shorten(empty)}. Add images or remove these classes.")
    small = [f"{name} ({size})" for name, size in sizes.items() if size < shots]
    if small:
        warnings.warn(f"{split.name}: fewer than {shots} training images, using all: {shorten(small)}", stacklevel=3)


def shorten(names: list[str]) -> str:
    """The first ten names, and the number of further ones."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def subsample_classes(split: Split, part: str) -> Split:
    """The split restricted to half of its classes: "base" has the first ceil(n / 2) labels, "new" the others,
    relabelled from 0; "all" is the unchanged split."""
    base = math.ceil(len(split.classnames) / 2)
    ranges = {"all": (0, len(split.classnames)), "base": (0, base), "new": (base, len(split.classnames))}
    if part not in ranges:
        raise ZooError(f"No classes {part!r}: choose base, new or all.")
    first, last = ranges[part]

    def keep(items: list[Item]) -> list[Item]:
        return [item._replace(label=item.label - first) for item in items if first <= item.label < last]

    return replace(
        split,
        classnames=split.classnames[first:last],
        train=keep(split.train),
        val=keep(split.val),
        test=keep(split.test),
    )


# --- parts of sources that lack some of the three --------------------------------------------------------------------

PART_NAMES = {  # common names of the parts
    "train": "train",
    "training": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def compose(name: str, classnames: list[str], parts: dict[str, list[Item]], note: str) -> Split:
    """A split from a source that may lack some of train, val and test.

    Without a test part, the validation part becomes the test part, and nothing is left for selection; with a train
    part only, val and test are held out from it. `note`, the beginning of a sentence on the items' source, is completed
    with what was done.
    """
    train, val, test = (parts.get(part, []) for part in PARTS)
    held_out = not (test or val)
    if test:
        done = "" if train else "; only a test part, nothing to train on"
    elif val:
        val, test, done = [], val, "; no test part: testing on the validation part"
    else:
        train, val, test = hold_out(sorted(train, key=lambda item: item.label))
        done = f"; no test part: {HELD_OUT}"
    split = Split(name, classnames, train, val, test, held_out=held_out)
    return replace(split, note=f"{name}: {note}{done}; {_sizes(split)} images.")


def _sizes(split: Split) -> str:
    return ", ".join(f"{part} {len(getattr(split, part)):,}" for part in PARTS)


TEST_SHARE = 0.3
HELD_OUT = "split 50/20/30 within each class, deterministically"


def for_training(split: Split, test: float | None = None) -> Split:
    """A split as training uses it: where images were held out here, no validation images, as nothing is selected on
    them, and this share of each class as test images.

    Args:
        split: the dataset.
        test: the share, at least 0 and below 1. Default: 0.3.

    Raises:
        ZooError: a share for a dataset that comes with test images, of all images, or of less than an image.
    """
    if not split.held_out:
        if test is not None:
            raise ZooError(f"{split.name} comes with its own test images: omit --test.")
        return split
    if test is not None and not 0 <= test < 1:
        raise ZooError(f"--test {test} must be a share of the images, such as 0.2; 0 trains on all.")
    test, fitted = TEST_SHARE if test is None else test, all_for_training(split)
    if test:
        train, tests = hold_out_share(fitted.train, test)
        if not tests:
            raise ZooError(f"--test {test} of these classes is less than an image each: raise it; 0 trains on all.")
        fitted = replace(fitted, train=train, test=tests)
    share = f"{100 - 100 * test:.3g}/{100 * test:.3g}"
    done = f"split {share} into training and test images within each class, deterministically"
    if test == 0:
        done = "all images are for training, none for a test"
    return replace(fitted, note=split.note.replace(HELD_OUT, done).replace(_sizes(split), _sizes(fitted)))


def check_testable(split: Split) -> None:
    """ZooError for a class with a single image, which cannot both train and test."""
    images = Counter(item.label for item in split.items)
    if single := [split.classnames[label] for label, count in images.items() if count == 1]:
        raise ZooError(
            f"The class {single[0]!r} has one image: it needs at least 2, to train and to test; for no test --test 0."
        )


def all_for_training(split: Split) -> Split:
    """The split with all its images as training images."""
    return replace(split, train=sorted(split.items, key=lambda item: (item.label, item.key)), val=[], test=[])


def hold_out_share(items: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Training and test images; every class keeps at least one for training. Items must be sorted by label."""
    train, test = [], []
    for _, group in groupby(items, key=lambda item: item.label):
        images = list(group)
        random.Random(0).shuffle(images)
        cut = max(1, len(images) - round(share * len(images)))
        train += images[:cut]
        test += images[cut:]
    return train, test


def hold_out(items: list[Item]) -> tuple[list[Item], list[Item], list[Item]]:
    """Train, val and test: half, a fifth and the rest of each class, shuffled. Items must be sorted by label.

    Every class has its own random stream, so that adding an image to one class does not affect the others.
    """
    train, val, test = [], [], []
    for _, group in groupby(items, key=lambda item: item.label):
        images = list(group)
        random.Random(0).shuffle(images)
        half, fifth = math.ceil(len(images) / 2), len(images) // 5
        train += images[:half]
        val += images[half : half + fifth]
        test += images[half + fifth :]
    return train, val, test
