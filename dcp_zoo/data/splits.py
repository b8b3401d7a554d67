"""Labelled images and their parts: as a source gives them, as made here, few-shot subsets, and base/new classes."""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from dcp_zoo.data import packaged
from dcp_zoo.data.images import Facts, file_sha256, in_threads, pixels_sha256
from dcp_zoo.data.packaged import SplitRows, is_own
from dcp_zoo.errors import ZooError, as_zoo_error, shorten, warn
from dcp_zoo.fields import Values

NO_CLASS = -1  # label of images of none of the classes
BYTES = ("utf-8", "surrogateescape")  # of the names of files, which need not be UTF-8
PARTS = ("train", "val", "test")


class Item(NamedTuple):
    """One labelled image. `path` is opened by `load_image`, and may be an image of PIL; `key` is the path as listed in
    the split, the same on every machine, or in training the hash of an image in memory, and is hashed itself; `label`
    indexes the split's class names; `added`: by a further labels file, as corrections are, and thus no sample;
    `group`: the same for images that were taken together, see `dcp_zoo.data.groups`, or "" for an image alone."""

    path: Any
    key: str
    label: int
    added: bool = False
    group: str = ""

    @property
    def name(self) -> str:
        """What messages call it: its path, or of an image in memory its key."""
        return self.path if isinstance(self.path, str) else self.key


@dataclass(frozen=True)
class Split:
    """The labelled images of a dataset in three parts: as a reader finds them, or completed by `split_images`."""

    name: str
    classnames: list[str]  # in label order
    train: list[Item] = field(default_factory=list)  # all images, if the source has no parts
    val: list[Item] = field(default_factory=list)
    test: list[Item] = field(default_factory=list)
    none: list[Item] = field(default_factory=list)  # of none of the classes: examples of what to reject
    note: str = ""  # sentences for the user about the source and the parts that were made here, or ""
    place: str = ""  # where the images were found, for messages
    held_out: bool = False  # whether the test images are a share of each class, chosen here
    unreadable: int = 0  # images that were left out, as they cannot be read

    def __repr__(self) -> str:
        sizes = f"{len(self.train)}/{len(self.val)}/{len(self.test)}"
        return f"Split({self.name!r}, {len(self.classnames)} classes, train/val/test {sizes})"

    @property
    def has_parts(self) -> bool:
        """Whether there are images for a test, not for training only."""
        return bool(self.test or self.val)

    @property
    def items(self) -> list[Item]:
        return self.train + self.val + self.test

    @cached_property
    def sha256(self) -> str:
        """Hash of a line `part<TAB>key<TAB>label<TAB>classname` for every image of train, then val, then test."""
        digest = hashlib.sha256()
        for part in PARTS:
            for item in getattr(self, part):
                digest.update(f"{part}\t{item.key}\t{item.label}\t{self.classnames[item.label]}\n".encode(*BYTES))
        return digest.hexdigest()


def subset_sha256(items: Iterable[Item]) -> str:
    """Hash of a list of images: sha256 of their keys joined by newlines."""
    return hashlib.sha256("\n".join(item.key for item in items).encode(*BYTES)).hexdigest()


def listed_split(name: str, rows: SplitRows, folder: str = "") -> Split:
    """The split that these rows list; their images are in a folder."""
    names = dict(sorted({label: classname for part in PARTS for _, label, classname in rows[part]}.items()))
    train, val, test = ([Item(f"{folder}/{key}", key, label) for key, label, _ in rows[part]] for part in PARTS)
    return Split(name, list(names.values()), train, val, test, place=folder)


def split_sha256(name: str) -> str | None:
    """`Split.sha256` of CoOp's split of this dataset, or of a part's; None if the package does not have it."""
    rows = packaged.split_rows(name)
    return listed_split(name, rows).sha256 if rows else None


def group_by(split: Split, how: str) -> Split:
    """The split with groups of images that were taken together: "folder", by their folder below that of the class; else
    by what a regular expression finds in their paths, or by its first (group). What it does not find is alone. ZooError
    for no such expression, and for one that finds nothing."""
    with as_zoo_error(f"--group-by {how} is neither folder nor a regular expression ({{}}).", re.error):
        pattern = re.compile(how)

    def name(item: Item) -> str:
        folder, match = item.key.rpartition("/")[0], pattern.search(item.key)
        if how == "folder":
            return folder if folder.rpartition("/")[2] != split.classnames[item.label] else ""
        return match[min(1, pattern.groups)] or "" if match else ""

    parts: Values = {
        part: [item._replace(group=name(item) and f"given {name(item)}") for item in getattr(split, part)]
        for part in PARTS
    }
    if not any(item.group for part in parts.values() for item in part):
        first = f", such as {split.items[0].key}" if split.items else ""
        raise ZooError(f"--group-by {how} finds no group in the paths of {split.place}{first}.")
    return replace(split, **parts)


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """The few-shot subset that CoOp, MaPLe and DCP draw for this seed: `shots` images per class from train, then
    min(shots, 4) from val; test is unchanged. A class with fewer images contributes all of them, with a warning.
    Classes are drawn in order of first appearance, and val continues train's random stream, so both affect which images
    are drawn. ZooError for shots < 1, and for a class without a training image."""
    if shots < 1:
        raise ZooError(f"shots must be 1 or more, not {shots}.")
    counts = Counter(item.label for item in split.train)
    sizes = {name: counts[label] for label, name in enumerate(split.classnames)}
    if empty := [name for name, size in sizes.items() if size == 0]:
        raise ZooError(f"{split.name}: no training image for {shorten(empty)}. Add images or remove these classes.")
    if small := [f"{name} ({size})" for name, size in sizes.items() if size < shots]:
        warn(f"{split.name}: fewer than {shots} training images, using all: {shorten(small)}")
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


def subsample_classes(split: Split, part: str) -> Split:
    """ "base", the first ceil(n / 2) classes, "new", the others, from 0, or "all". ZooError for fewer than four."""
    base = math.ceil(len(split.classnames) / 2)
    ranges = {"all": (0, len(split.classnames)), "base": (0, base), "new": (base, len(split.classnames))}
    if part != "all" and len(split.classnames) < 4:  # with one class, every answer would be right
        raise ZooError(f"{split.name} has {len(split.classnames)} classes: two halves need at least 2 each.")
    first, last = ranges[part]

    def keep(items: list[Item]) -> list[Item]:
        return [item._replace(label=item.label - first) for item in items if first <= item.label < last]

    kept: Values = {part: keep(getattr(split, part)) for part in PARTS}
    return replace(split, classnames=split.classnames[first:last], **kept)


OWN_TEST_SHARE = 0.3


def split_images(images: Split, test: float | None = None) -> Split:
    """The parts that a dataset comes with; if it has none, this share of each class as test images and the others as
    training images, by default 50/20/30. A validation part serves as test part if there is none; nothing is left for
    selection then. With `test=0`, all images are for training, also those of a given test part."""
    split, done = images, ""
    if test == 0:
        split, done = all_for_training(images), "all images are for training, none for a test"
    elif not images.test and images.val:
        split, done = replace(images, val=[], test=images.val), "testing on the validation part"
    elif not images.test:
        train, val, tests = divide(images.train, test)
        split = replace(images, train=train, val=val, test=tests, held_out=True)
        shares = f"{100 - 100 * test:.3g}/{100 * test:.3g} into training and test images" if test else "50/20/30"
        done = f"split {shares} within each class, deterministically"
    tested = {item.label for item in split.test}
    missing = [name for label, name in enumerate(split.classnames) if label not in tested] if tested else []
    untested = f"The accuracy says nothing about {shorten(missing)}: no test image." if missing else ""
    if done:
        sizes = ", ".join(f"{part} {len(getattr(split, part)):,}" for part in PARTS)
        done = f"{images.place} has no test part: {done}; {sizes} images."
    return replace(split, note=" ".join(filter(None, (done, images.note, untested))))


def training_split(images: Split, test: float | None = None) -> Split:
    """As `split_images`, but by default 30 % of the user's own images are for the test, and none for validation."""
    return split_images(images, OWN_TEST_SHARE if test is None and is_own(images.name) else test)


def check_test_share(images: Split, test: float | None) -> None:
    """ZooError unless `training_split` can hold out this share of the images for the test."""
    if images.has_parts:
        if test is not None:
            raise ZooError(f"{images.name} comes with its own test images: omit --test.")
        return
    if test is not None and not 0 <= test < 1:
        raise ZooError(f"--test {test} must be a share of the images, such as 0.2; 0 trains on all.")
    if test == 0 or (test is None and not is_own(images.name)):
        return
    counts = Counter(item.label for item in images.items)
    if single := [images.classnames[label] for label, count in counts.items() if count == 1]:
        raise ZooError(f"The class {single[0]!r} has one image: to train and test it needs 2; --test 0 tests on none.")
    if test is not None and not training_split(images, test).test:
        raise ZooError(f"--test {test} of these classes is less than one image each: raise it; 0 trains on all.")


def warn_of_numbers(classnames: Sequence[str]) -> None:
    """Warn of class names that are all numbers, or True and False, of which CLIP knows nothing."""
    if all(re.fullmatch(r"[-+]?\d+(\.\d+)?|True|False", name) for name in classnames):
        advice = 'rename the folders or, in Python, say what the numbers mean, as in classnames={0: "cat", 1: "dog"}'
        warn(f"CLIP reads the class names, which are {shorten(classnames, 3)}: {advice}.")


def all_for_training(split: Split) -> Split:
    return replace(split, train=sorted(split.items, key=lambda item: (item.label, item.key)), val=[], test=[])


def divide(items: list[Item], test: float | None = None) -> tuple[list[Item], list[Item], list[Item]]:
    """Train, val and test images of each class, shuffled: half, a fifth and the rest; or, given the share for the test,
    no val images and at least one for training. One more image in a class changes no other class. A group is in
    one part as a whole: parts may be smaller or larger, and one that spans classes is for training."""
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    classes = Counter(group for group, _ in {(item.group, item.label) for item in items})  # of each group
    for _, images in sorted(_by_label(items).items()):
        units = dict[object, list[Item]]()
        for i, item in enumerate(images):
            units.setdefault(item.group or i, []).append(item)
        size, order = len(images), list(units.values())
        random.Random(0).shuffle(order)
        first = math.ceil(size / 2) if test is None else max(1, size - round(test * size))
        second = first + size // 5 if test is None else first
        done = 0
        for unit in order:
            group, part = unit[0].group, PARTS[(done >= first) + (done >= second)]
            parts[PARTS[0] if group and classes[group] > 1 else part] += unit
            done += len(unit)
    return parts["train"], parts["val"], parts["test"]


DIGITS = 12  # of a hash: one of 10,000 images is taken for one of 100,000 different ones in 1 of 280,000 cases


def image_hashes(items: Sequence[Item], known: Mapping[str, Facts] | None = None) -> dict[str, str]:
    """The hashes of images, by which a head's `info` names those that it was trained on, separated by spaces: "files"
    of their bytes, and "pixels" of the images in memory, whose keys are their `pixels_sha256`. `known`: facts of items
    by key; other files are read."""
    facts = known or {}
    of_files = [item for item in items if isinstance(item.path, str)]
    files = in_threads(lambda item: facts[item.key].sha256 if item.key in facts else file_sha256(item.path), of_files)
    pixels = [item.key for item in items if not isinstance(item.path, str)]
    both = {"files": files, "pixels": pixels}
    return {kind: " ".join(name[:DIGITS] for name in names) for kind, names in both.items() if names}


def unseen(items: Sequence[Item], info: Values) -> list[Item]:
    """The images that are not among those that `info` names."""
    known = info.get("image_hashes") or {}
    files, pixels = (set(known.get(kind, "").split()) for kind in ("files", "pixels"))

    def is_new(item: Item) -> bool:
        if isinstance(item.path, str) and file_sha256(item.path)[:DIGITS] in files:
            return False
        return not pixels or pixels_sha256(item.path)[:DIGITS] not in pixels

    return [item for item, new in zip(items, in_threads(is_new, items), strict=True) if new] if known else list(items)
