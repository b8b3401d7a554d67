"""Train a head on a visitor's photographs, with its log while it runs."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from dcp_zoo.data import Item, Split
from dcp_zoo.demo.answers import to_batch
from dcp_zoo.demo.photos import Photo
from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.names import repeated_names
from dcp_zoo.training.loop import pick_device
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.training.run import Run, train_head

LOG_NAME = "log.csv"  # of `train_head`


def check_classes(classes: Sequence[tuple[str | None, list[Photo]]]) -> dict[str, list[Photo]]:
    """(name, photographs) of each class in the form, without empty ones; ZooError names what is missing."""
    stripped = [((name or "").strip(), photos) for name, photos in classes]  # an untouched field is None
    used = [(name, photos) for name, photos in stripped if name or photos]
    if len(used) < 2:
        raise ZooError("Training needs at least two classes: give each a name and at least one photograph.")
    if problem := repeated_names([name for name, _ in used if name]):
        raise ZooError(problem)
    for number, (name, photos) in enumerate(used, 1):
        if not name:
            raise ZooError(f"Class {number} has photographs but no name: give it one.")
        if not photos:
            raise ZooError(f"The class {name!r} has no photographs: add at least one, or remove its name.")
    return dict(used)


def fit_photos(model: str, classes: Mapping[str, list[Photo]], epochs: int, output: Path) -> Iterator[pd.DataFrame]:
    """Train a head on all photographs of the classes, and write its checkpoint to `output`.

    Yields:
        The log so far, with the columns step and loss, several times per second; finally the complete log, once the
        checkpoint is written. The photographs are on disk only during training.

    Raises:
        ZooError: training failed.
    """
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        items = _write(classes, Path(folder))
        split = Split("photos", list(classes), items, [], [])
        shots = max(len(photos) for photos in classes.values())
        recipe = default_recipe(model).updated({"epochs": epochs})
        run = Run(model, split, shots, 1, recipe, pick_device())
        training = thread.submit(train_head, run, output, test=False)
        while wait([training], timeout=0.25).not_done:
            yield read_log(output)
        training.result()
    yield read_log(output)


def _write(classes: Mapping[str, list[Photo]], folder: Path) -> list[Item]:
    items = []
    for label, photos in enumerate(classes.values()):
        for i, photo in enumerate(photos):
            path = folder / f"{label}-{i}.png"
            photo.image.save(path, compress_level=1)
            items.append(Item(str(path), path.name, label))
    return items


def read_log(output: Path) -> pd.DataFrame:
    """The complete lines of a training log; empty before the first."""
    log = output / LOG_NAME
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    rows = [line.split(",") for line in lines[1:] if line.endswith("\n")]
    return pd.DataFrame({"step": [int(row[0]) for row in rows], "loss": [float(row[3]) for row in rows]})


def zip_checkpoint(folder: Path) -> Path:
    """A zip next to a checkpoint folder, which unpacks to that folder."""
    return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name))


@torch.inference_mode()
def count_correct(model: DCP, classes: Mapping[str, list[Photo]]) -> tuple[int, int]:
    """The number of training photographs that the head classifies correctly, and their total."""
    photos = [photo for group in classes.values() for photo in group]
    labels = [label for label, group in enumerate(classes.values()) for _ in group]
    predicted = model(to_batch(model, photos)).argmax(-1).tolist()
    return sum(p == label for p, label in zip(predicted, labels, strict=True)), len(labels)
