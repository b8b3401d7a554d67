"""Load a dataset by name, and check the files on disk."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcp_zoo.data import packaged, readers
from dcp_zoo.data.find import find_images
from dcp_zoo.data.packaged import DATASETS, DatasetSpec, find_spec, is_user_data
from dcp_zoo.data.splits import Split, check_test_share, group_by, split_images, training_split
from dcp_zoo.data.unreadable import damaged, without_unreadable
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra, shorten
from dcp_zoo.progress import bar

READERS: dict[str, Callable[[DatasetSpec, Path], Split]] = {  # by layout: (table entry, the dataset's folder)
    "listed": readers.read_json,
    "aircraft": readers.read_aircraft,
    "imagenet": readers.read_imagenet,
    "folder": readers.read_folder,
    "style": readers.read_style,
    "digits": readers.read_digits,
}


LabelFiles = str | os.PathLike | Sequence[str | os.PathLike] | None


def load_split(name: str, root: str | os.PathLike | None = None) -> Split:
    """A dataset with its own parts or, if it has none, split 50/20/30 %; see `load_labelled`."""
    return split_images(load_labelled(name, root))


def load_labelled(name: str, root: str | os.PathLike | None = None, labels: LabelFiles = None) -> Split:
    """The dataset `name` (a key of `DATASETS`) from the data root, with a folder per dataset in CoOp's
    layout. `folder` reads `root` itself, one folder per class, or with `labels`
    the images that these files list; `digits` needs no root. ZooError for an unknown name, missing
    files, or a malformed split."""
    spec = find_spec(name)
    folder = _locate(spec, root)
    images = readers.read_labels(spec, folder, _files(labels)) if labels else READERS[spec.layout](spec, folder)
    if len(images.classnames) == 1:
        only = f"{images.source} has one class only, {images.classnames[0]!r}"
        raise ZooError(f"{only}: pass a place with a folder of images for each class.")
    if spec.split_file:
        missing = [item.path for item in images.items if not Path(item.path).exists()]
        if missing:
            raise ZooError(f"{name}: {_and_first(missing)} are missing. {spec.where}")
    return images


def table_columns(table: object) -> tuple[list[Any], list[Any]] | None:
    """The images, not decoded, and the labels of a Dataset of `datasets`, or of a Parquet file by its
    path; None for anything else. ZooError unless it is one part, not a stream, with the columns `image`
    and `label`."""
    if isinstance(table, (str, os.PathLike)) and str(table).endswith(".parquet"):
        dataset = import_extra("datasets", "data").Dataset
        with as_zoo_error(f"Cannot read {table}: {{}}. Pass a Parquet file.", Exception):  # it raises almost any
            table = dataset.from_parquet(str(table))
    if type(table).__module__.partition(".")[0] != "datasets":
        return None
    data: Any = table
    if isinstance(table, dict) or not hasattr(table, "__len__"):
        raise ZooError("Pass one part of a dataset, and no stream: dataset['train'], Dataset.from_list([*stream]).")
    if not {"image", "label"}.issubset(data.column_names):
        given = shorten(data.column_names)
        raise ZooError(f"This dataset has the columns {given}, not image and label: pass dataset.rename_column(...).")
    image = data.features["image"]
    names = getattr(data.features["label"], "names", None)
    data = data.with_format(None)
    if hasattr(image, "decode"):
        data = data.cast_column("image", replace(image, decode=False))
    labels = [*data["label"]]
    if names:
        labels = [None if i is None or i < 0 else names[i] for i in labels]  # of none, and -1 of a hidden test
    return [*data["image"]], labels


def load_for_training(
    dataset: str,
    data_root: str | os.PathLike | None,
    labels: LabelFiles = None,
    test: float | None = None,
    skip_unreadable: bool = False,
    groups: str | None = None,
) -> Split:
    """The images to train on, of a dataset or a folder. Own images without a test part are not split
    yet, as their groups decide that; `test` is the share to hold out, see `training_split`, `groups`
    says which images were taken together, see `group_by`, and `skip_unreadable` leaves some out, see
    `without_unreadable`."""
    images = load_labelled(dataset, data_root, labels)
    if skip_unreadable:
        images = without_unreadable(images)
    if groups:
        images = group_by(images, groups)
    check_test_share(images, test)
    return images if is_user_data(images.name) and not images.has_parts else training_split(images, test)


def listed_images(labels: LabelFiles, folder: str | os.PathLike) -> list[str]:
    """The images that labels files list with a class, see `readers.read_labels`, and those in folders
    among them. ZooError as of that."""
    images = []
    for file in _files(labels):
        if file.is_dir():
            images += find_images([str(file)])
            continue
        images += [row.path for row in readers.label_rows(file, Path(folder)) if row.name]
    return images


def _files(labels: LabelFiles) -> list[Path]:
    if isinstance(labels, (str, os.PathLike)):
        labels = [labels]
    return [Path(file) for file in labels or ()]


def _locate(spec: DatasetSpec, root: str | os.PathLike | None) -> Path:
    """The dataset's folder; ZooError names the first missing path."""
    if spec.folder is None:
        return Path(root or "").expanduser()
    if root is None:
        raise ZooError(f"{spec.name} needs a data root: pass --data-root DIR. {spec.where}")
    root = Path(root).expanduser().absolute()
    folder = root / spec.folder
    needed = [root, folder, folder / spec.images]
    if spec.split_file and packaged.split_rows(spec.name) is None:
        needed.append(folder / spec.split_file)
    for path in needed:
        if not path.exists():
            raise ZooError(f"{spec.name}: {path} does not exist. {spec.where}")
    return folder


def _and_first(paths: list[str]) -> str:
    return f"{len(paths)} images (the first: {paths[0]})"


@dataclass(frozen=True)
class CheckRow:
    """The result of `check` for one dataset."""

    name: str
    status: str  # "ok", "missing" (no files) or "broken" (see message)
    message: str
    counts: list[int] | None = None  # train, val and test images
    sha256: str = ""  # of the split, as its note
    note: str = ""


def check(root: str | os.PathLike | None, names: Sequence[str] | None = None) -> list[CheckRow]:
    """Check the datasets under the data root: a row for each of `names`, by default all that have a
    folder and are no part of another, with their counts and images, see `check_complete`."""
    whole = (name for name, spec in DATASETS.items() if spec.folder and not spec.part_of)
    specs = [find_spec(name) for name in (whole if names is None else names)]
    return [_check_one(spec, root) for spec in specs]


def _check_one(spec: DatasetSpec, root: str | os.PathLike | None) -> CheckRow:
    try:
        split = training_split(load_labelled(spec.name, root))
    except ZooError as error:
        exists = spec.folder is None or Path(root or "", spec.folder).expanduser().exists()
        return CheckRow(spec.name, "broken" if exists else "missing", str(error))
    counts = [len(split.train), len(split.val), len(split.test)]
    problems = []
    if spec.counts and counts != spec.counts:
        problems.append(f"{counts} train, val and test images instead of {spec.counts}")
    broken = damaged(split.items, progress=bar)
    if broken:
        problems.append(f"{_and_first([split.items[i].path for i in broken])} are damaged")
    status = "broken" if problems else "ok"
    message = f"{'; '.join(problems)}. {spec.where}" if problems else ""
    return CheckRow(spec.name, status, message, counts, split.sha256, split.note)
