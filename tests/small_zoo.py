"""The 11 datasets with three classes and a few images each, and a miniature trained for four steps: `hub/build.py` in
seconds."""

from dataclasses import replace
from pathlib import Path

import publish
import pytest
import trees
from PIL import Image

from dcp_zoo.data import DATASETS, list_datasets, packaged
from dcp_zoo.data.packaged import Archive
from dcp_zoo.zoo.registry import MODELS

NAMES = ["red", "green", "blue"]
DEAD = Archive("http://127.0.0.1:9/images.tar")
COUNTS = {"imagenet": (6, 0, 3), "fgvc_aircraft": (3, 3, 3)}
RECIPE = {"epochs": 4, "batch_size": 4}  # every step has all images, so that the loss falls


def shrink(manifest: Path, patch: pytest.MonkeyPatch) -> None:
    """Make datasets and recipe small, their splits CoOp's, and `manifest` the one that is written."""
    put, put_item = patch.setattr, patch.setitem
    put(packaged, "_class_names", lambda: dict.fromkeys((spec.names for spec in DATASETS.values()), NAMES))
    put(packaged, "split_rows", lambda name: None)
    put(packaged, "drawn", lambda *args: None)
    put(packaged, "wnid_names", lambda: dict(zip(trees.WNIDS, NAMES, strict=True)))
    put(trees, "WNIDS", trees.WNIDS[:3])
    for name in list_datasets():
        counts = COUNTS.get(name, (6, 3, 3))
        put_item(DATASETS, name, replace(DATASETS[name], num_classes=3, counts=counts, archives=(DEAD,)))
    mini = MODELS["dcp_mini"]
    put_item(MODELS, "dcp_mini", replace(mini, recipe=mini.recipe | RECIPE))
    put(publish, "MANIFEST", manifest)


def draw(path: Path) -> None:
    """A picture, with a colour of its own for every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = sum(path.stem.encode()) * 37
    Image.new("RGB", (32, 32), (number % 256, number * 7 % 256, number * 3 % 256)).save(path)


def write_data(root: Path) -> None:
    """The 11 datasets in their real layouts; call `shrink` first."""
    for name in list_datasets():
        trees.write_tree(root, name, draw)


def write_manifest(root: Path) -> Path:
    """The empty manifest of a source checkout."""
    path = root / "checkout" / "dcp_zoo" / "zoo" / "heads.json"
    path.parent.mkdir(parents=True)
    (root / "checkout" / "setup.cfg").touch()
    path.write_text("{}")
    return path
