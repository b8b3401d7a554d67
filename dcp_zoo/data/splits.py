"""Labelled images and their parts (train, val, test): CoOp's few-shot subsets and base/new classes, and
the parts that are made of a user's own images."""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple, TypeVar

from dcp_zoo.data import packaged
from dcp_zoo.data.images import Facts, file_sha256, in_threads, pixels_sha256
from dcp_zoo.errors import ZooError, as_zoo_error, shorten, warn
from dcp_zoo.fields import Values
from dcp_zoo.files import text_sha256

NO_CLASS = -1  # label of images of none of the classes
PARTS = ("train", "val", "test")
T = TypeVar("T")


class Item(NamedTuple):
    """One labelled image.

    Attributes:
        path: what `load_image` opens: a path, or an image in memory.
        key: the path as the split lists it, the same on every machine. Of an image in memory its number
            or, for training, the hash of its pixels.
        label: index into the split's class names.
        added: whether it comes from a second labels file, as corrections do: such images are not a
            random sample.
        group: the same for images that were taken together, see `dcp_zoo.data.groups`; "" for an image
            alone.
    """

    path: Any
    key: str
    label: int
    added: bool = False
    group: str = ""

    @property
    def is_file(self) -> bool:
        return isinstance(self.path, str)

    @property
    def name(self) -> str:
        """The image's name in messages: its path, or the key of an image in memory."""
        return self.path if self.is_file else self.key


@dataclass(frozen=True)
class Split:
    """The labelled images of a dataset in three parts: as a reader finds them, or completed by
    `split_images`."""

    name: str
    classnames: list[str]  # in label order
    train: list[Item] = field(default_factory=list)  # all images, if the source has no parts
    val: list[Item] = field(default_factory=list)
    test: list[Item] = field(default_factory=list)
    no_class: list[Item] = field(default_factory=list)  # of none of the classes: examples of what to reject
    note: str = ""  # sentences for the user about the source and the parts that were made here, or ""
    source: str = ""  # where the images were found, for messages
    held_out: bool = False  # whether the test images are a share of each class, chosen here

    def __repr__(self) -> str:
        sizes = f"{len(self.train)}/{len(self.val)}/{len(self.test)}"
        return f"Split({self.name!r}, {len(self.classnames)} classes, train/val/test {sizes})"

    @property
    def has_parts(self) -> bool:
        """Whether some images are for validation or for a test."""
        return bool(self.test or self.val)

    @property
    def items(self) -> list[Item]:
        """The images of all classes."""
        return self.train + self.val + self.test

    @property
    def all_items(self) -> list[Item]:
        """Those, and the images of no class."""
        return self.items + self.no_class

    @property
    def learnt_from(self) -> list[Item]:
        """All that a head is fitted to or chosen by."""
        return self.train + self.val + self.no_class

    @cached_property
    def sha256(self) -> str:
        """Hash of a line `part<TAB>key<TAB>label<TAB>classname` for every image of train, then val,
        then test."""
        lines = []
        for part in PARTS:
            for item in getattr(self, part):
                lines.append(f"{part}\t{item.key}\t{item.label}\t{self.classnames[item.label]}\n")
        return text_sha256("".join(lines))

    def with_each(self, change: Callable[[Item], Item | None]) -> "Split":
        """The split with `change` applied to each image of train, of val and of test; None leaves it out."""
        parts: Values = {part: list(filter(None, map(change, getattr(self, part)))) for part in PARTS}
        return replace(self, **parts)


def subset_sha256(items: Iterable[Item]) -> str:
    """Hash of a list of images: sha256 of their keys joined by newlines."""
    return text_sha256("\n".join(item.key for item in items))


def listed_split(name: str, rows: packaged.SplitRows, folder: str = "") -> Split:
    """The split that these rows list; their images are in a folder."""
    parts: Values = {}
    names = set[tuple[int, str]]()
    for part in PARTS:
        parts[part] = [Item(f"{folder}/{key}", key, label) for key, label, _ in rows[part]]
        names |= {(label, classname) for _, label, classname in rows[part]}
    return Split(name, [classname for _, classname in sorted(names)], **parts, source=folder)


def split_sha256(name: str) -> str | None:
    """`Split.sha256` of CoOp's split of this dataset, or of a part's; None if the package does not have
    it."""
    rows = packaged.split_rows(name)
    return listed_split(name, rows).sha256 if rows else None


def group_by(split: Split, how: str) -> Split:
    """The split with groups of images that were taken together.

    Args:
        split: the images.
        how: "folder": images in one folder below that of the class are a group. Else a regular
            expression: what it, or its first (group), finds in an image's path is the name of its
            group; images in which it finds nothing are alone. ZooError for a malformed expression, and
            if no image has a group.
    """
    with as_zoo_error(f"--group-by {how} is neither folder nor a regular expression ({{}}).", re.error):
        pattern = re.compile(how)

    def grouped(item: Item) -> Item:
        folder = item.key.rpartition("/")[0]
        match = pattern.search(item.key)
        group = match[min(1, pattern.groups)] if match else ""
        if how == "folder":
            is_class_folder = folder.rpartition("/")[2] == split.classnames[item.label]
            group = "" if is_class_folder else folder
        return item._replace(group=given_group(group))

    found = split.with_each(grouped)
    if not any(item.group for item in found.items):
        example = f", such as {split.items[0].key}" if split.items else ""
        raise ZooError(f"--group-by {how} finds no group in the paths of {split.source}{example}.")
    return found


def given_group(name: str | None) -> str:
    """The group of an image by the user's name of it, which may be empty; never that of a group that
    was found."""
    return f"given {name}" if name else ""


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """The few-shot subset that CoOp, MaPLe and DCP draw for this seed: `shots` images per class from
    train, then min(shots, 4) from val; test is unchanged. A class with fewer images contributes all of
    them, with a warning. Classes are drawn in order of first appearance, and val continues train's
    random stream, so both affect which images are drawn. ZooError for shots < 1, and for a class
    without a training image."""
    if shots < 1:
        raise ZooError(f"shots must be 1 or more, not {shots}.")
    counts = Counter(item.label for item in split.train)
    sizes = [(name, counts[label]) for label, name in enumerate(split.classnames)]
    empty = [name for name, size in sizes if size == 0]
    if empty:
        raise ZooError(f"{split.name}: no training image for {shorten(empty)}. Add images or remove these classes.")
    small = [f"{name} ({size})" for name, size in sizes if size < shots]
    if small:
        warn(f"{split.name}: fewer than {shots} training images, using all: {shorten(small)}")
    rng = random.Random(seed)
    train = _draw(split.train, shots, rng)
    val = _draw(split.val, min(shots, 4), rng)
    return replace(split, train=train, val=val)


def _draw(items: list[Item], shots: int, rng: random.Random) -> list[Item]:
    drawn: list[Item] = []
    for images in by_key(items, [item.label for item in items]).values():
        drawn += rng.sample(images, shots) if len(images) >= shots else images
    return drawn


def by_key(items: Sequence[T], keys: Iterable[Any]) -> dict[Any, list[T]]:
    """Items by the key of each, keys in order of first appearance."""
    found = defaultdict[Any, list[T]](list)
    for key, item in zip(keys, items, strict=True):
        found[key].append(item)
    return found


def subsample_classes(split: Split, part: str) -> Split:
    """The images of "all" classes; of "base", the first ceil(n / 2) classes; or of "new", the others,
    with labels that count from 0. ZooError for halves of fewer than four classes."""
    if part == "all":
        return split
    count = len(split.classnames)
    if count < 4:  # with one class, every prediction would be right
        raise ZooError(f"{split.name} has {count} classes: two halves need at least 2 each.")
    half = math.ceil(count / 2)
    labels = range(half) if part == "base" else range(half, count)

    def renumbered(item: Item) -> Item | None:
        return item._replace(label=item.label - labels.start) if item.label in labels else None

    return replace(split.with_each(renumbered), classnames=split.classnames[labels.start : labels.stop])


OWN_TEST_SHARE = 0.3


def split_images(images: Split, test: float | None = None) -> Split:
    """The parts that a dataset comes with; if it has none, this share of each class as test images and
    the others as training images, by default 50/20/30. A validation part serves as test part if there
    is none; nothing is left for selection then. With `test=0`, all images are for training, also those
    of a given test part."""
    split = images
    change = ""
    if test == 0:
        split = all_for_training(images)
        change = "all images are for training, none for a test"
    elif not images.has_parts:
        split = replace(images, **divide(images.train, test), held_out=True)
        shares = f"{100 - 100 * test:.3g}/{100 * test:.3g} into training and test images" if test else "50/20/30"
        change = f"split {shares} within each class, deterministically"
    elif not images.test:
        split = replace(images, val=[], test=images.val)
        change = "testing on the validation part"
    notes = []
    if change:
        sizes = f"train {len(split.train):,}, val {len(split.val):,}, test {len(split.test):,}"
        notes.append(f"{images.source} has no test part: {change}; {sizes} images.")
    if images.note:
        notes.append(images.note)
    return replace(split, note=" ".join(notes))


def training_split(images: Split, test: float | None = None) -> Split:
    """As `split_images`, but by default 30 % of the user's own images are for the test, and none for
    validation."""
    if test is None and packaged.is_user_data(images.name):
        test = OWN_TEST_SHARE
    return split_images(images, test)


def check_test_share(images: Split, test: float | None) -> None:
    """ZooError unless `training_split` can hold out this share of the images for the test."""
    if images.has_parts:
        if test is not None:
            raise ZooError(f"{images.name} comes with its own test images: omit --test.")
        return
    if test is not None and not 0 <= test < 1:
        raise ZooError(f"--test {test} must be a share of the images, such as 0.2; 0 trains on all.")
    if test and not training_split(images, test).test:
        raise ZooError(f"--test {test} of these classes is less than one image each: raise it; 0 trains on all.")


def warn_of_numbers(classnames: Sequence[str]) -> None:
    """Warn of class names that are all numbers, or True and False, of which CLIP knows nothing."""
    if all(re.fullmatch(r"[-+]?\d+(\.\d+)?|True|False", name) for name in classnames):
        advice = 'rename the folders or, in Python, say what the numbers mean, as in classnames={0: "cat", 1: "dog"}'
        warn(f"CLIP reads the class names, which are {shorten(classnames, 3)}: {advice}.")


def all_for_training(split: Split) -> Split:
    train = sorted(split.items, key=lambda item: (item.label, item.key))
    return replace(split, train=train, val=[], test=[])


def divide(items: list[Item], test: float | None = None) -> Values:
    """The images of the parts train, val and test, of each class, shuffled.

    One more image in a class changes no other class. A group is in one part as a whole, so that parts
    may be smaller or larger; a group with images of several classes is for training.

    Args:
        items: the images.
        test: the share for the test; the others, at least one of each class, are for training. By
            default half of a class is for training, a fifth for validation, and the rest for the test.
    """
    parts: Values = {part: [] for part in PARTS}
    labelled_groups = {(item.group, item.label) for item in items if item.group}
    classes_of = Counter(group for group, _ in labelled_groups)
    for _, images in sorted(by_key(items, [item.label for item in items]).items()):
        size = len(images)
        if test is None:
            training = math.ceil(size / 2)
            validation = size // 5
        else:
            training = max(1, size - round(test * size))
            validation = 0
        groups = by_key(images, [item.group or i for i, item in enumerate(images)])
        order = list(groups.values())
        random.Random(0).shuffle(order)
        done = 0
        for group in order:
            part = "test"
            if done < training or classes_of[group[0].group] > 1:
                part = "train"
            elif done < training + validation:
                part = "val"
            parts[part] += group
            done += len(group)
    return parts


DIGITS = 12  # of a hash: one of 10,000 images is taken for one of 100,000 different ones in 1 of 280,000 cases


def image_hashes(items: Sequence[Item], known: Mapping[str, Facts] | None = None) -> dict[str, str]:
    """The hashes by which a head's `info` names its training images, separated by spaces: under "files"
    those of the files' bytes, and under "pixels" those of images in memory, whose keys are their
    `pixels_sha256`.

    Args:
        items: the images.
        known: facts of items by key; other files are read.
    """
    facts = known or {}

    def file_hash(item: Item) -> str:
        return facts[item.key].sha256 if item.key in facts else file_sha256(item.path)

    files = list(in_threads(file_hash, [item for item in items if item.is_file]))
    pixels = [item.key for item in items if not item.is_file]
    hashes = {"files": files, "pixels": pixels}
    return {kind: " ".join(name[:DIGITS] for name in names) for kind, names in hashes.items() if names}


def in_several_classes(items: Sequence[Item], hashes: Mapping[str, str]) -> list[list[Item]]:
    """The items that are the same image with several labels, by the `image_hashes` of all."""
    files_first = sorted(items, key=lambda item: not item.is_file)
    same = by_key(files_first, " ".join(hashes.values()).split())
    return [images for images in same.values() if len({item.label for item in images}) > 1]


def not_trained_on(items: Sequence[Item], info: Values) -> list[Item]:
    """The images that are not among the training images in a head's `info`."""
    hashes = info.get("image_hashes", {})
    files = set(hashes.get("files", "").split())
    pixels = set(hashes.get("pixels", "").split())

    def is_new(item: Item) -> bool:
        if files and item.is_file and file_sha256(item.path)[:DIGITS] in files:
            return False
        return not pixels or pixels_sha256(item.path)[:DIGITS] not in pixels

    return list(compress(items, in_threads(is_new, items)))
