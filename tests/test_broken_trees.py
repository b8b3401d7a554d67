"""Every loader rejects every kind of broken tree, with a message about what is wrong and where."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import trees
from PIL import Image
from trees import write_tree

from dcp_zoo.data import DATASETS, check, load_image, load_split, packaged
from dcp_zoo.errors import ZooError

NAMES = ["imagenet", "food101", "dtd", "fgvc_aircraft", "imagenetv2", "pacs_photo"]
LISTED, AIRCRAFT = ["food101", "dtd"], ["fgvc_aircraft"]
PACKAGED = ["dtd"]
IMAGENETS = [name for name in NAMES if name.startswith("imagenet")]
FOLDERS = [name for name in NAMES if name not in [*LISTED, *AIRCRAFT]]


@pytest.fixture(autouse=True)
def few_classes(monkeypatch) -> None:
    """The largest datasets have 20 classes, the smaller variants of ImageNet 4: thousands of files for each
    test take long to write, and longer to remove."""
    few = {"food101": 20, "sun397": 20} | {name: DATASETS[name].num_classes // 50 for name in IMAGENETS}
    names, wnids = packaged._class_names(), dict(islice(packaged.wnid_names().items(), 20))
    first = {name: names[name][:20] for name in ("food101", "sun397", "imagenet")}
    monkeypatch.setattr(packaged, "_class_names", lambda: names | first)
    monkeypatch.setattr(packaged, "wnid_names", lambda: wnids)
    monkeypatch.setattr(trees, "WNIDS", trees.WNIDS[:20])
    for name, number in few.items():
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], num_classes=number))


@pytest.fixture
def linked(tmp_path) -> Callable[[Path], None]:
    """Creates images fast, as links to one real image."""
    picture = tmp_path / "picture.jpg"
    Image.effect_noise((64, 64), 50).save(picture)

    def make(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(picture, path)

    return make


def folder_of(root: Path, name: str) -> Path:
    return root / DATASETS[name].folder


def images_of(root: Path, name: str) -> Path:
    return folder_of(root, name) / DATASETS[name].images


def listing_of(root: Path, name: str) -> Path:
    return folder_of(root, name) / DATASETS[name].split_file


def rename_class(root: Path, name: str) -> None:
    first_image(root, name).parent.rename(images_of(root, name) / "n9")


def other_row(root: Path, name: str) -> None:
    row = "0000000 Zebu" if name in AIRCRAFT else ["a.jpg", 0, "Zebu"]
    change_rows(root, name, lambda rows: [row, *rows[1:]])


def first_image(root: Path, name: str) -> Path:
    return sorted(path for path in images_of(root, name).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[0]


def change_rows(root: Path, name: str, change: Callable[[list], list]) -> None:
    """Change the rows of the training images."""
    file = listing_of(root, name)
    if name in AIRCRAFT:
        file.write_text("\n".join(change(file.read_text().splitlines())))
    else:
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"train": change(content["train"])}))


def empty_class(root: Path, name: str) -> None:
    """Remove class 0 from the training images."""
    change_rows(root, name, lambda rows: rows[1 if name in AIRCRAFT else 2 :])


def empty_folder(root: Path, name: str) -> None:
    for file in first_image(root, name).parent.iterdir():
        file.unlink()


BREAKS: dict[str, list[tuple[list[str], Callable[[Path, str], object], str]]] = {  # what: (datasets, how, message)
    "no folder": [(NAMES, lambda root, name: folder_of(root, name).rename(root / "gone"), "not exist. Get it from")],
    "no images": [(NAMES, lambda root, name: images_of(root, name).rename(root / "gone"), "not exist. Get it from")],
    "no listing": [
        (["food101"], lambda root, name: listing_of(root, name).unlink(), "not exist. Get it from"),
        (AIRCRAFT, lambda root, name: listing_of(root, name).unlink(), "not exist. Get it from"),
        # the package's listing is used, and the trees have other images and classes
        (PACKAGED, lambda root, name: listing_of(root, name).unlink(), "images .* are missing. Get it from"),
    ],
    "malformed listing": [
        (LISTED, lambda root, name: listing_of(root, name).write_text('{"train": ['), "as JSON"),
        (LISTED, lambda root, name: listing_of(root, name).write_text('{"train": {}}'), "must have the lists"),
        (AIRCRAFT, lambda root, name: listing_of(root, name).write_text("{"), "'{' is not an image number"),
    ],
    "label and name disagree": [
        (LISTED, other_row, "pairs of a label and a name, not"),
        (AIRCRAFT, other_row, "is not an image number and a name"),
        (IMAGENETS, rename_class, "folders of its classes, among"),
    ],
    "no image": [
        ([*LISTED, *AIRCRAFT], lambda root, name: first_image(root, name).unlink(), r"1 images \(.*\) are missing")
    ],
    "empty class": [
        ([*LISTED, *AIRCRAFT], empty_class, "each with a training image"),
        (FOLDERS, empty_folder, "has no image .*Add one or remove it"),
    ],
}
CASES = [
    pytest.param(name, how, message, id=f"{name}-{what}")
    for what, rules in BREAKS.items()
    for names, how, message in rules
    for name in names
]


@pytest.mark.parametrize(("name", "how", "message"), CASES)
def test_broken_tree_is_rejected(tmp_path, linked, name, how, message):
    write_tree(tmp_path, name, linked)
    how(tmp_path, name)
    with pytest.raises(ZooError, match=message):
        load_split(name, tmp_path)
    [row] = check(tmp_path, names=[name])
    assert row.status != "ok"


@pytest.mark.parametrize("name", ["imagenet", "dtd", "pacs_photo"])
def test_damaged_image_is_found(tmp_path, linked, name):
    write_tree(tmp_path, name, linked)
    broken = first_image(tmp_path, name)
    content = broken.read_bytes()
    broken.unlink()  # a link to the image that all share
    broken.write_bytes(content[: len(content) // 2])
    [row] = check(tmp_path, names=[name])
    assert f"1 images (the first: {broken}) are damaged" in row.message
    with pytest.raises(ZooError, match="Cannot read the image .*truncated"):
        load_image(str(broken))
