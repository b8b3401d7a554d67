"""One reader for each layout of a dataset on disk, and those of class names and descriptions. Bad input: ZooError."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from PIL import Image

from dcp_zoo.data import packaged
from dcp_zoo.data.find import KNOWN, images_in, is_image, is_visible, warn_of_skipped
from dcp_zoo.data.packaged import DatasetSpec, SplitRows
from dcp_zoo.data.splits import NO_CLASS, PARTS, Item, Split, few_shot, listed_split
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra, shorten
from dcp_zoo.fields import Values, mismatch
from dcp_zoo.files import read_plain
from dcp_zoo.tables import NONE, active, is_none, is_reserved, read_csv, read_text

FILES = ("file", "filename", "file_name", "path", "filepath", "image", "image_path")
CLASSES = ("class", "label", "classname", "class_name", "category", "species")
# the last four are of the package's tables
LABEL_COLUMNS = (FILES, CLASSES, ("change",), ("error",), ("rejected",), ("probability",), ("part",))
LABELS_FORM = "a labels file is a CSV or .xlsx file with the columns file and class"
ANSWERS = "the answers of a head: unless you corrected them, the accuracy says how well they are repeated"
PART_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}  # a train is a class, too


def read_json(spec: DatasetSpec, folder: Path) -> Split:
    """`{"train": [[path, label, classname], ...], "val": [...], "test": [...]}`, on disk or CoOp's in the package."""
    assert spec.split_file
    file = folder / spec.split_file
    rows = packaged.split_rows(spec.name)
    if rows is not None and not file.exists():
        return _from_rows(spec, folder, file, rows)
    text = _read_text(file, spec)
    with as_zoo_error(f"{file} is not JSON ({{}}). {spec.where}"):
        content = json.loads(text)
    lists = [content.get(part) for part in PARTS] if isinstance(content, dict) else [None]
    if mismatch(lists, list[list[tuple[str, int, str]]]):
        raise ZooError(f"{file} must have the lists train, val and test of [path, label, class name]. {spec.where}")
    return _from_rows(spec, folder, file, content)


def read_aircraft(spec: DatasetSpec, folder: Path) -> Split:
    """`variants.txt`, one class name per line in label order, and `images_variant_<part>.txt`, lines `number name`."""
    names = _read_text(folder / "variants.txt", spec).splitlines()
    labels = {name.strip(): label for label, name in enumerate(names)}
    rows: dict[str, list[tuple[str, int, str]]] = {part: [] for part in PARTS}
    for part in PARTS:
        file = folder / f"images_variant_{part}.txt"
        for line in _read_text(file, spec).splitlines():
            number, _, name = line.strip().partition(" ")
            if name not in labels:
                raise ZooError(f"{file}: {line!r} is not an image number and a name in variants.txt. {spec.where}")
            rows[part].append((f"{number}.jpg", labels[name], name))
    return _from_rows(spec, folder, folder / "variants.txt", rows)


def _read_text(file: Path, spec: DatasetSpec) -> str:
    with as_zoo_error(f"{spec.name}: cannot read {file} ({{}}). {spec.where}"):
        return read_plain(file).decode()


def _from_rows(spec: DatasetSpec, folder: Path, file: Path, rows: SplitRows) -> Split:
    """Check the rows listed in `file` and convert them to items."""
    base = folder / spec.images
    if problem := _problem(spec, base, rows):
        raise ZooError(f"{file}: {problem}. {spec.where}")
    split = listed_split(spec.name, rows, str(base))
    return replace(split, note=_note_on(split, file))


def _note_on(split: Split, file: Path) -> str:
    """A sentence for the user if the split that was read from `file` is not CoOp's, else ""."""
    rows, drawn = packaged.split_rows(split.name), packaged.drawn(split.name)
    if rows is not None:
        known = [[key, label] for part in PARTS for key, label, _ in rows[part]]
        is_coops = known == [[item.key, item.label] for item in split.items]
    else:
        is_coops = drawn in (None, [item.key for item in few_shot(split, 1, 1).train])
    if is_coops:
        return ""
    return f"{file} is not CoOp's split of {split.name}: results on it cannot be compared with published ones."


def _problem(spec: DatasetSpec, images: Path, rows: SplitRows) -> str:
    """What is wrong with the rows' paths, labels and names, or ""."""
    seen: set[tuple[str, ...]] = set()
    names: dict[int, str] = {}
    for key, label, name in (row for part in PARTS for row in rows[part]):
        path = PureWindowsPath(key)  # handles both separators, and drives
        if path.anchor or ".." in path.parts or not path.parts:
            return f"the path {key!r} leaves the image folder {images}"
        if path.parts in seen:
            return f"the path {key!r} is listed twice"
        seen.add(path.parts)
        if names.setdefault(label, name) != name:
            return f"label {label} has two names, {names[label]!r} and {name!r} (at {key!r})"
    if sorted(names) != list(range(len(names))):
        return f"the {len(names)} labels must run from 0 without gaps, found {sorted(names)[:3]} ... {max(names)}"
    if len(names) != spec.num_classes:
        return f"{len(names)} classes, but {spec.name} has {spec.num_classes}"
    if repeated := [name for name, times in Counter(names.values()).items() if times > 1]:
        return f"several labels have the same name: {', '.join(sorted(repeated))}"
    empty = set(names.values()).difference(name for _, _, name in rows["train"])
    return f"no training image for {shorten(sorted(empty))}" if empty else ""


def read_imagenet(spec: DatasetSpec, folder: Path) -> Split:
    """`images/train/<wnid>` and `images/val/<wnid>`, labels by sorted wnid. As in CoOp, ImageNet's validation images
    are the test part. There is no val part: nothing is selected on them. A variant has only a test part: `<wnid>`, or
    in ImageNetV2 ImageNet's labels."""
    base, names = folder / spec.images, packaged.wnid_names()
    if spec.name == "imagenet":
        (classes, train), (_, test) = (_known_classes(spec, base, part, names) for part in ("train", "val"))
        return Split(spec.name, classes, train, test=test, place=str(base))
    if spec.name == "imagenetv2":
        names = {str(label): name for label, name in enumerate(names.values())}
    classes, test = _known_classes(spec, base, "", names)
    return Split(spec.name, classes, test=test, place=str(base))


def _known_classes(spec: DatasetSpec, base: Path, part: str, names: Mapping[str, str]) -> tuple[list[str], list[Item]]:
    """The classes with a folder in `base/part`, in the order of `names`, and their images; ZooError unless their number
    is right and all folders are named."""
    folders = _class_folders(base / part)
    classes = [folder for folder in names if folder in folders]
    if len(folders) != spec.num_classes or len(classes) != len(folders):
        unknown = sorted({*folders} - {*classes})
        which = f"; no class of ImageNet: {shorten(unknown)}" if unknown else ""
        raise ZooError(f"{base / part}: {len(folders)} class folders, not {spec.num_classes}{which}. {spec.where}")
    return [names[folder] for folder in classes], _listing(base, classes, Counter(), part)


def read_folder(spec: DatasetSpec, folder: Path) -> Split:
    """`<class>/**/*.jpg`, or with parts `train/<class>`, `test/<class>` and maybe `val/<class>`."""
    skipped = Counter[str]()
    if (folder / "train").is_dir() and _folders(folder / "train"):
        if stray := sorted(set(_class_folders(folder)).difference(PARTS)):
            raise ZooError(f"{folder} has train/, so only val/ and test/ may be next to it: move {shorten(stray)}.")
        classes = _class_folders(folder / "train")
        given = [part for part in PARTS if part != "val" or (folder / part).exists()]
        for part in given:
            if difference := sorted(set(classes).symmetric_difference(_class_folders(folder / part))):
                names = ", ".join(difference)
                raise ZooError(f"{folder / part} must have the same class folders as train/; they differ in: {names}.")
        parts: Values = {part: _listing(folder, classes, skipped, part) for part in given}
    else:
        classes, given = _class_folders(folder), [""]
        if PART_NAMES.issuperset(map(str.lower, classes)):
            raise ZooError(f"{folder} has no classes, but parts: rename {', '.join(classes)} to train, test and val.")
        parts = {"train": _listing(folder, classes, skipped)}
    loose = (entry.name for entry in os.scandir(folder) if is_visible(entry.name) and is_image(entry.name))
    skipped.update(f"{Path(name).suffix.lower()} in no class folder" for name in loose)
    warn_of_skipped(folder, skipped)
    reserved = [Path(part, name).as_posix() for part in given for name in _folders(folder / part) if is_reserved(name)]
    examples = [key for key in reserved if key.startswith(given[0]) and is_none(Path(key).name)]
    none = [item for key in examples for item in _images(folder, key, NO_CLASS, Counter())]
    left_out = ", ".join(key for key in reserved if key not in examples)
    note = f"Left out: the images in {left_out}, as these names are reserved." if left_out else ""
    return Split(spec.name, classes, **parts, none=none, note=note, place=str(folder))


class LabelRow(NamedTuple):
    """A row of a labels file."""

    where: str  # for messages
    image: str  # its path
    name: str  # of the class, or a reserved one
    unreadable: bool  # of a table that says why the image cannot be read
    is_answer: bool  # of a head, with its probability, or `NONE` by its threshold
    part: str = "train"  # of inspection.csv


def label_rows(file: Path) -> Iterator[LabelRow]:
    """The rows of a .csv or .xlsx file of images and their classes: columns `file` and `class`, or these in this order
    without a header. A `change` of inspection.csv replaces the class, and its `part` counts. A class of an
    image that a head rejected is a person's."""
    with as_zoo_error(f"Cannot read {file} ({{}}): {LABELS_FORM}.", Exception):  # openpyxl raises almost any
        rows = [[cell.strip() for cell in row] for row in _table(file)]
        header = [cell.lower() for cell in rows[0]]
    columns = [next((i for i, cell in enumerate(header) if cell in names), -1) for names in LABEL_COLUMNS]
    if "suggestion" not in header:  # it is no inspection.csv
        columns[2] = columns[6] = -1
    first = 2
    if -1 in columns[:2]:
        if len(header) != 2 or not is_image(rows[0][0]):
            raise ZooError(f"{file} has the columns {', '.join(rows[0])}: {LABELS_FORM}.")
        columns, rows, first = [0, 1, -1, -1, -1, -1, -1], [[], *rows], 1
    for number, row in enumerate(rows[1:], first):
        image, name, change, error, rejected, probability, part = ("" if i < 0 else row[i] for i in columns)
        is_rejected = rejected.lower() == "true"
        name = NONE if is_none(change or name) else change or name
        wrong = not image or not name or len(row) > len(header) or rejected.lower() not in ("", "true", "false")
        wrong = wrong or part not in ("", *PARTS)
        if wrong and not error:
            raise ZooError(f"{file}, row {number}: {row} is not a file and one class; {LABELS_FORM}.")
        is_answer = is_rejected if name == NONE else bool(probability) and not is_rejected  # but a person's class
        yield LabelRow(f"{file}, row {number}: {row}", image, name, bool(error), is_answer, part or PARTS[0])


def read_labels(spec: DatasetSpec, folder: Path, file: Path) -> Split:
    """The images that a labels file lists, see `label_rows`, at paths in `folder` or, as in the tables of `dcp-zoo
    predict`, in the current folder. What has no class is left out: unreadable images, and those that a head rejected;
    what a person called "none of these" is an example of that."""
    listed: dict[str, tuple[str, str, str]] = {}  # paths, classes and parts
    left_out, missing, answers = Counter[str](), [], 0
    for where, image, name, unreadable, is_answer, part in label_rows(file):
        answers += is_answer
        if unreadable or (is_reserved(name) and (is_answer or name != NONE)):
            left_out["that cannot be read" if unreadable else f"{name!r}"] += 1
        elif not (path := _listed(image, folder)):
            missing.append(image)
        elif listed.setdefault(os.path.relpath(path, folder), (path, name, part))[1] != name:
            raise ZooError(f"{where} has another class than the same file above.")
    if missing or not listed:
        known = f"{file} lists {len(listed) + len(missing)} images with a class, of which {len(missing)} are not in"
        where = f"{folder} or the current folder: {shorten(missing)}"
        raise ZooError(f"{known} {where}. Pass the folder that their paths start from, or run the command there.")
    classes = sorted({name for _, name, _ in listed.values()} - {NONE})
    labels = {name: label for label, name in enumerate(classes)} | {NONE: NO_CLASS}
    parts: Values = {name: [] for name in (*PARTS, "none")}
    for key, (path, name, part) in sorted(listed.items(), key=lambda row: (labels[row[1][1]], row[0])):
        parts["none" if name == NONE else part].append(Item(path, key.replace(os.sep, "/"), labels[name]))
    without = ", ".join(f"{count} {what}" for what, count in left_out.items())
    notes = f"Left out of {file}: {without}." * bool(without), f"{file} has {ANSWERS}." * bool(answers)
    return Split(spec.name, classes, **parts, note=" ".join(filter(None, notes)), place=str(file))


def _listed(image: str, folder: Path) -> str:
    """The path of an image that a labels file lists, or "" if it is neither in the folder, also by the name of this
    folder, nor in the current one."""
    places = [Path(os.path.abspath(place)) for place in (folder, "")]  # noqa: PTH100  without .., so that each file ...
    paths = (os.path.abspath(place / image) for place in (*places, places[0].parent))  # noqa: PTH100  ... has one path
    inside = (path for path in paths if any(map(Path(path).is_relative_to, places)))
    return next(filter(os.path.isfile, inside), "")  # Path would raise for long texts


def _table(file: Path) -> list[list[str]]:
    """The rows of a CSV file, see `read_csv`, or of a spreadsheet's active sheet, but for empty ones."""
    if file.suffix.lower() != ".xlsx":
        return read_csv(file)
    content = BytesIO(read_plain(file))
    sheet = import_extra("openpyxl", "data").load_workbook(content, read_only=True, data_only=True).active
    if not hasattr(sheet, "values"):
        raise ValueError("its active sheet is no table")
    return [["" if cell is None else active(str(cell)) for cell in row] for row in sheet.values if any(row)]


def read_style(spec: DatasetSpec, folder: Path) -> Split:
    """One style of PACS, `<style>/<class>/*.jpg`: all for the test, but for the one that shifts to the others."""
    images = read_folder(spec, folder / spec.images)
    if len(images.classnames) != spec.num_classes:
        raise ZooError(f"{images.place}: {len(images.classnames)} classes, not {spec.num_classes}. {spec.where}")
    return images if spec.shifts else replace(images, train=[], val=[], test=images.items)


def read_digits(spec: DatasetSpec, _: Path) -> Split:
    """scikit-learn's 1797 digits, (8, 8) grey levels from 0 to 16, as images in memory."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    levels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")
    items = [Item(Image.fromarray(levels[i]), str(i), int(labels[i])) for i in labels.argsort(kind="stable")]
    classes = [str(digit) for digit in range(10)]
    return Split(spec.name, classes, items, place=spec.name)


def _listing(base: Path, classes: Sequence[str], skipped: Counter[str], part: str = "") -> list[Item]:
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
    """Class names from a file: a JSON list, CoOp's ImageNet file (`n01440764 tench`), or one name per line."""
    with as_zoo_error(f"Cannot read class names from {path} ({{}}). Use a text file, one name per line."):
        text = read_text(Path(path))
        names = json.loads(text) if text.lstrip().startswith("[") else re.split("\r?\n|\r", text)
    names = [name for line in names if (name := line.strip() if isinstance(line, str) else line) != ""]
    if not any(names) or not all(isinstance(name, str) for name in names):
        raise ZooError(f"{path} must be a list of class names: one name per line, or a JSON list of names.")
    if all(re.match(r"n\d{8}\s", name) for name in names):
        return [name.split(maxsplit=1)[1] for name in names]
    return names


def read_descriptions(path: str | Path) -> dict[str, list[str]]:
    """Sentences by class name from a file in the format of CuPL: `{"class name": ["sentence", ...], ...}`."""
    with as_zoo_error(f"Cannot read descriptions from {path} ({{}}). Use {CUPL}."):
        descriptions = json.loads(read_plain(path).decode("utf-8-sig"))
    if not descriptions or mismatch(descriptions, dict[str, list[str]]):
        raise ZooError(f"{path} has no descriptions: use {CUPL}.")
    if bad := [name for name, texts in descriptions.items() if not texts or not all(map(str.strip, texts))]:
        raise ZooError(
            f"{path} has an empty list or sentence for {shorten(list(map(repr, bad)), 5)}: write one or more."
        )
    return descriptions
