"""One reader for each layout of a dataset on disk, and those of class names and descriptions. Bad
input: ZooError."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dcp_zoo.data import packaged
from dcp_zoo.data.find import KNOWN, images_in, is_image, is_visible, warn_of_skipped
from dcp_zoo.data.packaged import DatasetSpec, SplitRows
from dcp_zoo.data.splits import NO_CLASS, PARTS, Item, Split, few_shot, given_group, listed_split, split_sha256
from dcp_zoo.errors import ZooError, as_zoo_error, shorten
from dcp_zoo.fields import Values, mismatch
from dcp_zoo.files import read_plain
from dcp_zoo.tables import NONE, is_none, is_reserved, read_csv, read_text

ALSO_CALLED = {"image": "file", "label": "class"}  # columns
LABELS_FORM = "a labels file is a CSV file with the columns file and class"
PREDICTIONS = "has the answers of a head: unless you corrected them, the accuracy says how well they are repeated"
# that folders of parts have, whatever their letter case; "train" alone may be a class of trains
PART_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


def read_json(spec: DatasetSpec, folder: Path) -> Split:
    """`{"train": [[path, label, classname], ...], "val": [...], "test": [...]}`, on disk or CoOp's in the
    package."""
    assert spec.split_file
    file = folder / spec.split_file
    rows = packaged.split_rows(spec.name)
    if rows is None or file.exists():
        rows = _parsed(file, spec, json.loads, "JSON")
        lists = [rows.get(part) for part in PARTS] if isinstance(rows, dict) else [None]
        if mismatch(lists, list[list[tuple[str, int, str]]]):
            form = "the lists train, val and test of [path, label, class name]"
            raise ZooError(f"{file} must have {form}. {spec.where}")
    return _from_rows(spec, folder, file, rows)


def read_aircraft(spec: DatasetSpec, folder: Path) -> Split:
    """`variants.txt`, one class name per line in label order, and `images_variant_<part>.txt`, lines
    `number name`."""
    names = _parsed(folder / "variants.txt", spec).splitlines()
    labels = {name.strip(): label for label, name in enumerate(names)}
    rows: dict[str, list[tuple[str, int, str]]] = {part: [] for part in PARTS}
    for part in PARTS:
        file = folder / f"images_variant_{part}.txt"
        for line in _parsed(file, spec).splitlines():
            number, _, name = line.strip().partition(" ")
            if name not in labels:
                raise ZooError(f"{file}: {line!r} is not an image number and a name in variants.txt. {spec.where}")
            rows[part].append((f"{number}.jpg", labels[name], name))
    return _from_rows(spec, folder, folder / "variants.txt", rows)


def _parsed(file: Path, spec: DatasetSpec, parse: Callable[[bytes], Any] = bytes.decode, form: str = "text") -> Any:
    """The content of a file, parsed; ZooError if it cannot be read or is not in this form."""
    with as_zoo_error(f"{spec.name}: cannot read {file} as {form} ({{}}). {spec.where}"):
        return parse(read_plain(file))


def _from_rows(spec: DatasetSpec, folder: Path, file: Path, rows: SplitRows) -> Split:
    """The split that `file` lists; ZooError unless each label has one name and a training image."""
    named = {(label, name) for part in PARTS for _, label, name in rows[part]}
    trained = {label for _, label, _ in rows["train"]}
    if len(named) != spec.num_classes or trained != set(range(len(named))):
        wrong = f"{file} has {len(named)} pairs of a label and a name, not {spec.num_classes}"
        raise ZooError(f"{wrong}, labels from 0, each with a training image. {spec.where}")
    split = listed_split(spec.name, rows, str(folder / spec.images))
    if _is_coops(split):
        return split
    note = f"{file} is not CoOp's split of {spec.name}: results on it cannot be compared with published ones."
    return replace(split, note=note)


def _is_coops(split: Split) -> bool:
    """Whether this is CoOp's split of the dataset or, where the package has its first draw alone, has
    this draw."""
    expected = split_sha256(split.name)
    if expected:
        return split.sha256 == expected
    drawn = packaged.drawn(split.name)
    return drawn is None or drawn == [item.key for item in few_shot(split, 1, 1).train]


def read_imagenet(spec: DatasetSpec, folder: Path) -> Split:
    """`images/train/<wnid>` and `images/val/<wnid>`, labels by sorted wnid. As in CoOp, ImageNet's
    validation images are the test part. There is no val part: nothing is selected on them. A variant
    has only a test part: `<wnid>`, or in ImageNetV2 ImageNet's labels."""
    base = folder / spec.images
    names = packaged.wnid_names()
    if spec.name == "imagenet":
        classes, train = _known_classes(spec, base, "train", names)
        _, test = _known_classes(spec, base, "val", names)
        return Split(spec.name, classes, train, test=test, source=str(base))
    if spec.name == "imagenetv2":
        names = {str(label): name for label, name in enumerate(names.values())}
    classes, test = _known_classes(spec, base, "", names)
    return Split(spec.name, classes, test=test, source=str(base))


def _known_classes(spec: DatasetSpec, base: Path, part: str, names: Mapping[str, str]) -> tuple[list[str], list[Item]]:
    """The classes with a folder in `base/part`, ordered as `names`, and their images; ZooError unless
    these are all."""
    folders = _class_folders(base / part)
    classes = [folder for folder in names if folder in folders]
    if len(folders) != spec.num_classes or len(classes) != len(folders):
        known = f"{len(classes)} folders of its classes, among {len(folders)}, not {spec.num_classes}"
        raise ZooError(f"{base / part} has {known}. {spec.where}")
    return [names[folder] for folder in classes], _listing(base, classes, Counter(), part)


def read_folder(spec: DatasetSpec, folder: Path) -> Split:
    """`<class>/**/*.jpg`, or with parts `train/<class>`, `test/<class>` and maybe `val/<class>`."""
    given = [""]
    if (folder / "train").is_dir() and _folders(folder / "train"):
        given = [part for part in PARTS if part != "val" or (folder / part).exists()]
        stray = sorted(set(_class_folders(folder)).difference(PARTS))
        if stray:
            raise ZooError(f"{folder} has train/, so only val/ and test/ may be next to it: move {shorten(stray)}.")
    classes = _class_folders(folder / given[0])
    if given == [""] and PART_NAMES.issuperset(map(str.lower, classes)):
        raise ZooError(f"{folder} has no classes, but parts: rename {', '.join(classes)} to train, test and val.")
    for part in given[1:]:
        different = sorted(set(classes).symmetric_difference(_class_folders(folder / part)))
        if different:
            names = ", ".join(different)
            raise ZooError(f"{folder / part} must have the same class folders as train/; they differ in: {names}.")
    skipped = Counter[str]()
    parts: Values = {part or "train": _listing(folder, classes, skipped, part) for part in given}
    for entry in os.scandir(folder):
        if is_visible(entry.name) and is_image(entry.name):
            skipped["images in no class folder"] += 1
    no_class: list[Item] = []
    for part in given:
        for name in filter(is_reserved, _folders(folder / part)):
            key = Path(part, name).as_posix()
            if is_none(name) and part == given[0]:
                no_class += _images(folder, key, NO_CLASS, Counter())
            else:
                skipped[f"folder {key}"] += 1
    warn_of_skipped(folder, skipped)
    return Split(spec.name, classes, **parts, no_class=no_class, source=str(folder))


class LabelRow(NamedTuple):
    """A row of a labels file."""

    path: str  # of the image, see `listed_image`
    name: str  # of the class, `NONE`, or "" for an image to leave out
    part: str  # train, val or test
    group: str  # the same for images that were taken together, or ""
    is_prediction: bool  # whether it has a head's probability
    added: bool = False  # whether the first of several files does not list it


def label_rows(file: Path, folder: Path) -> list[LabelRow]:
    """The rows of a CSV file about images of a folder; it may lack the columns part, group and probability.
    What is called "leave out", or nothing, has no class; ZooError if that is so of all, and for images with a
    class that are not there."""
    with as_zoo_error(f"Cannot read {file} ({{}}): {LABELS_FORM}."):
        header, *rows = [[cell.strip() for cell in row] for row in read_csv(file)]
    columns = [cell.lower() for cell in header]
    for name, other in ALSO_CALLED.items():
        if other not in columns:
            columns = [other if column == name else column for column in columns]
    if not {"file", "class"}.issubset(columns):
        raise ZooError(f"{file} has the columns {', '.join(header)}: {LABELS_FORM}.")
    listed = []
    missing = []
    for number, row in enumerate(rows, 2):
        cells = dict(zip(columns, row, strict=False))
        image = cells["file"]
        name = cells["class"]
        part = cells.get("part") or PARTS[0]
        if not image or len(row) > len(header) or part not in PARTS:
            raise ZooError(f"{file}, row {number}: {row} is not a file, its class and perhaps its part; {LABELS_FORM}.")
        if is_none(name):
            name = NONE
        elif is_reserved(name):
            name = ""
        path = listed_image(image, folder)
        if path:
            group = given_group(cells.get("group"))
            listed.append(LabelRow(path, name, part, group, is_prediction=bool(cells.get("probability"))))
        elif name:
            missing.append(image)
    if missing:
        problem = f"{file} lists {len(rows)} images, of which {len(missing)} are not in"
        where = f"{folder} or the current folder: {shorten(missing)}"
        raise ZooError(f"{problem} {where}. Pass the folder that their paths start from, or run the command there.")
    if not any(row.name for row in listed):
        raise ZooError(f"{file} lists {len(listed):,} images, none with a class: fill in its column class.")
    return listed


def read_labels(spec: DatasetSpec, folder: Path, files: Sequence[Path]) -> Split:
    """The images that labels files list, see `label_rows`.

    What is called "none of these" is an example of that.

    Args:
        spec: the dataset's name is the split's.
        folder: where the files' paths start or, as in the tables of `dcp-zoo predict`, in the current
            folder.
        files: the last one that lists an image says its class; images that the first one does not list
            are `added`.
    """
    rows: dict[str, LabelRow] = {}  # by the real path of the image
    notes = []
    for file in files:
        listed = label_rows(file, folder)
        names: dict[str, str] = {}  # by the real path
        for row in listed:
            real = os.path.realpath(row.path)
            if names.setdefault(real, row.name) != row.name:
                problem = f"{row.path} has two classes, {names[real]!r} and {row.name!r}"
                raise ZooError(f"{file}: {problem}: keep one of them.")
            first = rows.get(real, row._replace(added=file != files[0]))
            rows[real] = first._replace(name=row.name)
        left_out = [*names.values()].count("")
        if left_out:
            notes.append(f"Left out of {file}: {left_out:,} images without a class.")
        if any(row.is_prediction for row in listed):
            notes.append(f"{file} {PREDICTIONS}.")
    classes = sorted({row.name for row in rows.values()} - {NONE, ""})
    labels = {name: label for label, name in enumerate(classes)} | {NONE: NO_CLASS}
    parts: Values = {part: [] for part in (*PARTS, "no_class")}
    for row in rows.values():
        if row.name:
            key = os.path.relpath(row.path, folder).replace(os.sep, "/")
            part = "no_class" if row.name == NONE else row.part
            parts[part].append(Item(row.path, key, labels[row.name], row.added, row.group))
    for images in parts.values():
        images.sort(key=lambda item: (item.label, item.key))
    return Split(spec.name, classes, **parts, note=" ".join(notes), source=", ".join(map(str, files)))


def listed_image(image: str, folder: Path) -> str:
    """The path of an image that a labels file lists, or "" if it is neither in the folder nor in the current
    one."""
    # abspath, as resolve would follow links: without .., each file has one path
    base = os.path.abspath(folder)  # noqa: PTH100
    current = os.getcwd()  # noqa: PTH109
    for start in (base, current):
        path = os.path.abspath(os.path.join(start, image))  # noqa: PTH100, PTH118
        is_inside = Path(path).is_relative_to(base) or Path(path).is_relative_to(current)
        if is_inside and os.path.isfile(path):  # noqa: PTH113  Path would raise for long texts
            return path
    return ""


def read_style(spec: DatasetSpec, folder: Path) -> Split:
    """One style of PACS, `<style>/<class>/*.jpg`: all for the test, but for the one that shifts to the
    others."""
    images = read_folder(spec, folder / spec.images)
    if len(images.classnames) != spec.num_classes:
        raise ZooError(f"{images.source}: {len(images.classnames)} classes, not {spec.num_classes}. {spec.where}")
    return images if spec.shifts else replace(images, train=[], val=[], test=images.items)


def read_digits(spec: DatasetSpec, _: Path) -> Split:
    """scikit-learn's 1797 digits, (8, 8) grey levels from 0 to 16, as images in memory."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = (digits.images * (255 / 16)).round().astype("uint8")
    labels = digits.target
    items = [Item(Image.fromarray(levels[i]), str(i), int(labels[i])) for i in labels.argsort(kind="stable")]
    classes = [str(digit) for digit in range(10)]
    return Split(spec.name, classes, items, source=spec.name)


def _listing(base: Path, classes: Sequence[str], skipped: Counter[str], part: str) -> list[Item]:
    """Images of `base/<part>/<class>` and its subfolders, sorted, labelled by the order of `classes`."""
    items: list[Item] = []
    for label, name in enumerate(classes):
        key = f"{part}/{name}" if part else name
        images = _images(base, key, label, skipped)
        if not images:
            raise ZooError(f"The class folder {base / key} has no image ({KNOWN}). Add one or remove it.")
        items += images
    return items


def _images(base: Path, key: str, label: int, skipped: Counter[str]) -> list[Item]:
    """Images of `base/<key>` and its subfolders, sorted; `skipped` counts the other files."""
    inside = f"{base / key}{os.sep}"
    files = sorted(file.removeprefix(inside).replace(os.sep, "/") for file in images_in(base / key, skipped))
    return [Item(f"{base}/{key}/{file}", f"{key}/{file}", label) for file in files]


def _class_folders(folder: Path) -> list[str]:
    """Sorted names of the visible folders in `folder`."""
    if not folder.is_dir():
        raise ZooError(f"There is no folder {folder}: it must hold one folder of images per class.")
    names = [name for name in _folders(folder) if not is_reserved(name)]
    if not names:
        instead = "For unsorted images there is search --to-label."
        raise ZooError(f"{folder} has no class folders: it must hold one folder of images per class. {instead}")
    return names


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and is_visible(entry.name))


CUPL = 'JSON as of CuPL, {"class name": ["sentence", "another sentence"]}'


def read_classnames(path: str | Path) -> list[str]:
    """Class names from a file: a JSON list, or one name per line."""
    with as_zoo_error(f"Cannot read class names from {path} ({{}}). Use a text file, one name per line."):
        text = read_text(Path(path))
        names = json.loads(text) if text.lstrip().startswith("[") else re.split("\r?\n|\r", text)
    if not all(isinstance(name, str) for name in names) or not any(map(str.strip, names)):
        raise ZooError(f"{path} must be a list of class names: one name per line, or a JSON list of names.")
    return [name.strip() for name in names if name.strip()]


def read_descriptions(path: str | Path) -> dict[str, list[str]]:
    """Sentences by class name from a file in the format of CuPL: `{"class name": ["sentence", ...],
    ...}`."""
    with as_zoo_error(f"Cannot read descriptions from {path} ({{}}). Use {CUPL}."):
        descriptions = json.loads(read_plain(path).decode("utf-8-sig"))
    if not descriptions or mismatch(descriptions, dict[str, list[str]]):
        raise ZooError(f"{path} has no descriptions: use {CUPL}.")
    for name, texts in descriptions.items():
        if not texts or not all(map(str.strip, texts)):
            raise ZooError(f"{path} has an empty list or sentence for {name!r}: write one or more.")
    return descriptions
