"""One reader for each layout of a dataset on disk, and those of class names and descriptions. Bad input: ZooError."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dcp_zoo.data import packaged
from dcp_zoo.data.find import KNOWN, images_in, is_image, is_visible, warn_of_skipped
from dcp_zoo.data.packaged import DatasetSpec, SplitRows
from dcp_zoo.data.splits import NO_CLASS, PARTS, Item, Split, few_shot, listed_split
from dcp_zoo.errors import ZooError, as_zoo_error, shorten
from dcp_zoo.fields import Values, mismatch
from dcp_zoo.files import read_plain
from dcp_zoo.tables import NONE, is_none, is_reserved, read_csv, read_text

LABEL_COLUMNS = (("file", "image"), ("class", "label"), ("part",), ("group",), ("probability",))
LABELS_FORM = "a labels file is a CSV file with the columns file and class"
ANSWERS = "has the answers of a head: unless you corrected them, the accuracy says how well they are repeated"
PART_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}  # a train is a class, too


def read_json(spec: DatasetSpec, folder: Path) -> Split:
    """`{"train": [[path, label, classname], ...], "val": [...], "test": [...]}`, on disk or CoOp's in the package."""
    assert spec.split_file
    file = folder / spec.split_file
    rows = packaged.split_rows(spec.name)
    if rows is not None and not file.exists():
        return _from_rows(spec, folder, file, rows)
    with as_zoo_error(f"{spec.name}: cannot read {file} as JSON ({{}}). {spec.where}"):
        content = json.loads(read_plain(file))
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
    """The split that `file` lists; ZooError unless each label has one name and a training image."""
    named = {(label, name) for part in PARTS for _, label, name in rows[part]}
    if len(named) != spec.num_classes or {label for _, label, _ in rows["train"]} != set(range(len(named))):
        wrong = f"{file} has {len(named)} pairs of a label and a name, not {spec.num_classes}"
        raise ZooError(f"{wrong}, labels from 0, each with a training image. {spec.where}")
    split = listed_split(spec.name, rows, str(folder / spec.images))
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
    """The classes with a folder in `base/part`, ordered as `names`, and their images; ZooError unless these are all."""
    folders = _class_folders(base / part)
    classes = [folder for folder in names if folder in folders]
    if len(folders) != spec.num_classes or len(classes) != len(folders):
        unknown = sorted({*folders} - {*classes})
        which = f"; no class of ImageNet: {shorten(unknown)}" if unknown else ""
        raise ZooError(f"{base / part}: {len(folders)} class folders, not {spec.num_classes}{which}. {spec.where}")
    return [names[folder] for folder in classes], _listing(base, classes, Counter(), part)


def read_folder(spec: DatasetSpec, folder: Path) -> Split:
    """`<class>/**/*.jpg`, or with parts `train/<class>`, `test/<class>` and maybe `val/<class>`."""
    skipped, given = Counter[str](), [""]
    if (folder / "train").is_dir() and _folders(folder / "train"):
        given = [part for part in PARTS if part != "val" or (folder / part).exists()]
        if stray := sorted(set(_class_folders(folder)).difference(PARTS)):
            raise ZooError(f"{folder} has train/, so only val/ and test/ may be next to it: move {shorten(stray)}.")
    classes = _class_folders(folder / given[0])
    if given == [""] and PART_NAMES.issuperset(map(str.lower, classes)):
        raise ZooError(f"{folder} has no classes, but parts: rename {', '.join(classes)} to train, test and val.")
    for part in given[1:]:
        if difference := sorted(set(classes).symmetric_difference(_class_folders(folder / part))):
            names = ", ".join(difference)
            raise ZooError(f"{folder / part} must have the same class folders as train/; they differ in: {names}.")
    parts: Values = {part or "train": _listing(folder, classes, skipped, part) for part in given}
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

    image: str  # its path
    name: str  # of the class, `NONE`, or "" for an image to leave out
    part: str  # train, val or test
    group: str  # the same for images that were taken together, or ""
    is_answer: bool  # whether it has a head's probability


def label_rows(file: Path) -> list[LabelRow]:
    """The rows of a CSV file with some of `LABEL_COLUMNS`. What is called "leave out", or nothing, has no class."""
    with as_zoo_error(f"Cannot read {file} ({{}}): {LABELS_FORM}."):
        header, *rows = [[cell.strip() for cell in row] for row in read_csv(file)]
    columns = [next((i for i, cell in enumerate(header) if cell.lower() in names), -1) for names in LABEL_COLUMNS]
    if -1 in columns[:2]:
        raise ZooError(f"{file} has the columns {', '.join(header)}: {LABELS_FORM}.")
    listed = []
    for number, row in enumerate(rows, 2):
        image, name, part, group, probability = ("" if i < 0 else row[i] for i in columns)
        if not image or len(row) > len(header) or part not in ("", *PARTS):
            raise ZooError(f"{file}, row {number}: {row} is not a file, its class and perhaps its part; {LABELS_FORM}.")
        name = NONE if is_none(name) else "" if is_reserved(name) else name
        listed.append(LabelRow(image, name, part or PARTS[0], group and f"given {group}", bool(probability)))
    return listed


def read_labels(spec: DatasetSpec, folder: Path, files: Sequence[Path]) -> Split:
    """The images that labels files list, see `label_rows`, at paths in `folder` or, as in the tables of `dcp-zoo
    predict`, in the current folder. The last file that lists an image says its class; images that the first one does
    not list are `added`. What is called "none of these" is an example of that."""
    images: dict[str, tuple[str, str, Item]] = {}  # by its place on the disk: class and part, and the image
    notes = []
    for file in files:
        rows, missing, before = label_rows(file), list[str](), len(images)
        listed: dict[str, str] = {}
        for image, name, part, group, _ in rows:
            if not (path := listed_image(image, folder)):
                missing += [image] if name else []
                continue
            place, key = os.path.realpath(path), os.path.relpath(path, folder).replace(os.sep, "/")
            if listed.setdefault(place, name) != name:
                raise ZooError(f"{file}: {image} has two classes, {listed[place]!r} and {name!r}: keep one of them.")
            new = name, part, Item(path, key, NO_CLASS, file != files[0], group)
            images[place] = (name, *images[place][1:]) if place in images else new
        if missing or not any(listed.values()):
            known = f"{file} lists {len(listed) + len(missing)} images, of which {len(missing)} are not in"
            where = f"{folder} or the current folder: {shorten(missing)}"
            raise ZooError(f"{known} {where}. Pass the folder that their paths start from, or run the command there.")
        if left_out := [*listed.values()].count(""):
            notes.append(f"Left out of {file}: {left_out:,} images without a class.")
        if file != files[0]:
            notes.append(f"{file}: {len(images) - before:,} images added.")
        if any(row.is_answer for row in rows):
            notes.append(f"{file} {ANSWERS}.")
    classes = sorted({name for name, *_ in images.values()} - {NONE, ""})
    labels = {name: label for label, name in enumerate(classes)} | {NONE: NO_CLASS}
    parts: Values = {name: [] for name in (*PARTS, "none")}
    for name, part, item in images.values():
        if name:
            parts["none" if name == NONE else part].append(item._replace(label=labels[name]))
    for items in parts.values():
        items.sort(key=lambda item: (item.label, item.key))
    return Split(spec.name, classes, **parts, note=" ".join(notes), place=", ".join(map(str, files)))


def listed_image(image: str, folder: Path) -> str:
    """The path of an image that a labels file lists, or "" if it is neither in the folder, also by the name of this
    folder, nor in the current one."""
    places = [Path(os.path.abspath(place)) for place in (folder, "")]  # noqa: PTH100  without .., so that each file ...
    paths = (os.path.abspath(place / image) for place in (*places, places[0].parent))  # noqa: PTH100  ... has one path
    inside = (path for path in paths if any(map(Path(path).is_relative_to, places)))
    return next(filter(os.path.isfile, inside), "")  # Path would raise for long texts


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
