"""Tiny datasets in their real layouts: every class, few images."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from PIL import Image

from dcp_zoo.data import DATASETS, classnames, packaged

LISTED = [name for name, spec in DATASETS.items() if spec.layout == "listed"]


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path)


def rows(name: str) -> dict[str, list[list]]:
    """A split file's content: two training images, one for val and one for test per class."""
    count = {"train": 2, "val": 1, "test": 1}
    folder = {"train": "cars_train", "val": "cars_train", "test": "cars_test"} if name == "stanford_cars" else {}
    names = classnames(name)
    return {
        part: [
            [f"{folder.get(part, 'sub')}/{label}_{part}_{i}.jpg", label, names[label]]
            for label in range(len(names))
            for i in range(n)
        ]
        for part, n in count.items()
    }


def write_listed(root: Path, name: str, content: object = None, make: Callable[[Path], object] = touch) -> Path:
    """A tiny dataset with a JSON split under `root`, its images created by `make`; returns the split
    file."""
    spec = DATASETS[name]
    content = rows(name) if content is None else content
    folder = root / spec.folder
    (folder / spec.images).mkdir(parents=True)
    for key, *_ in chain(*content.values()):
        make(folder / spec.images / key)
    file = folder / spec.split_file
    file.write_text(json.dumps(content))
    return file


def write_aircraft(root: Path, make: Callable[[Path], object] = touch) -> Path:
    folder, names = root / "fgvc_aircraft", classnames("fgvc_aircraft")
    for start, part in enumerate(("train", "val", "test")):
        numbers = [f"{start}{label:06d}" for label in range(len(names))]
        for number in numbers:
            make(folder / "images" / f"{number}.jpg")
        lines = [f"{number} {name}" for number, name in zip(numbers, names, strict=True)]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "variants.txt").write_text("\n".join(names) + "\n")
    return folder


WNIDS = list(packaged.wnid_names())


def write_folders(
    folder: Path,
    names: list[str],
    files: tuple[str, ...] = ("b.JPEG", "a.JPEG"),
    make: Callable[[Path], object] = touch,
) -> None:
    for name in names:
        for file in files:
            make(folder / name / file)


def write_imagenet(root: Path, make: Callable[[Path], object] = touch) -> Path:
    folder = root / "imagenet"
    write_folders(folder / "images/train", WNIDS, make=make)
    write_folders(folder / "images/val", WNIDS, ("v.JPEG",), make)
    return folder


def variant_folders(name: str) -> dict[str, int]:
    """The class folders of a variant of ImageNet and their labels in ImageNet."""
    labels = range(len(WNIDS)) if DATASETS[name].num_classes == len(WNIDS) else range(3, len(WNIDS), 5)
    return {str(label) if name == "imagenetv2" else WNIDS[label]: label for label in labels}


def write_tree(root: Path, name: str, make: Callable[[Path], object] = touch) -> None:
    """Any dataset of the table that has files."""
    spec = DATASETS[name]
    if name in LISTED:
        write_listed(root, name, make=make)
    elif name == "fgvc_aircraft":
        write_aircraft(root, make)
    elif name == "imagenet":
        write_imagenet(root, make)
    elif name in DATASETS["imagenet"].shifts:
        write_folders(root / spec.folder / spec.images, list(variant_folders(name)), ("a.jpg",), make)
    else:
        write_folders(root / spec.folder / spec.images, classnames(name), ("a.jpg", "b.jpg"), make)
