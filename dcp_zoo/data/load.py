"""Loading a dataset by name, and checking what is on disk."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dcp_zoo.data.images import check_header, load_image
from dcp_zoo.data.splits import DatasetSpec, Item, Split
from dcp_zoo.data.table import DATASETS, classnames, find_spec
from dcp_zoo.errors import ZooError


def load_split(name: str, root: str | os.PathLike | None = None) -> Split:
    """The dataset `name` (a key of `DATASETS`) from the data root, which holds a folder for each dataset in CoOp's
    layout (`root/caltech-101/...`); the dataset's own folder will do too. `folder` reads `root` itself, one folder a
    class; `digits` needs no root, nor do `hf://datasets/ORG/NAME` and `wds:///PATH`.

    Raises ZooError for an unknown name, for files that are not there, and for a split that is malformed. Warns if the
    split's class names are not those of `classnames(name)`, which the zoo's heads were trained for.
    """
    spec = find_spec(name)
    folder = _locate(spec, root)
    split = spec.reader(spec, folder)
    if spec.split_file:
        _check_files(spec, split, folder / spec.images)
    if spec.names:
        _warn_if_renamed(split, classnames(name))
    return split


def _locate(spec: DatasetSpec, root: str | os.PathLike | None) -> Path:
    """The dataset's folder; ZooError names the first path that is not there."""
    if spec.folder is None:
        return Path(root or "").expanduser()
    if root is None:
        raise ZooError(f"{spec.name}: say where the data are (--data-root DIR). {spec.where}")
    root = Path(root).expanduser().absolute()
    folder = root / spec.folder
    if not folder.exists() and _is_own_folder(spec, root):
        folder = root
    for path in [root, folder, folder / (spec.split_file or ""), folder / spec.images]:
        if not path.exists():
            raise ZooError(f"{spec.name}: nothing at {path}. {spec.where}")
    return folder


def _is_own_folder(spec: DatasetSpec, root: Path) -> bool:
    return (root / spec.split_file).is_file() if spec.split_file else root.name == spec.folder


def _check_files(spec: DatasetSpec, split: Split, images: Path) -> None:
    """Raise ZooError unless the listed images are there, and inside the image folder where links lead out of it."""
    missing = [item for item in split.items if not Path(item.path).exists()]
    if missing:
        raise ZooError(f"{spec.name}: {_summary(missing)} are missing. {spec.where}")
    home, folders = os.path.realpath(images) + os.sep, cache(os.path.realpath)
    outside = []
    for item in split.items:
        parent, file = os.path.split(item.path)
        target = os.path.realpath(item.path) if Path(item.path).is_symlink() else f"{folders(parent)}/{file}"
        if not target.startswith(home):
            outside.append(item)
    if outside:
        raise ZooError(
            f"{spec.name}: {_summary(outside)} are links that leave {images}. Put the files there; the folder itself "
            "may be a link."
        )


def _summary(items: list[Item]) -> str:
    return f"{len(items)} images (the first: {items[0].path})"


def _warn_if_renamed(split: Split, known: list[str]) -> None:
    for label, (found, expected) in enumerate(zip(split.classnames, known, strict=True)):
        if found != expected:
            warnings.warn(
                f"{split.name}: label {label} is {found!r} in this split and {expected!r} in the zoo's class names, "
                "which the pretrained heads know.",
                stacklevel=3,
            )
            return


@dataclass(frozen=True)
class CheckRow:
    """What `check` found of one dataset. `found` and `expected` are train, val and test sizes, `note` and `sha256`
    those of the split."""

    name: str
    status: str  # "ok", "missing" (nothing there) or "broken" (see message)
    message: str
    expected: tuple[int, int, int] | None = None
    found: tuple[int, int, int] | None = None
    sha256: str = ""
    note: str = ""


def check(
    root: str | os.PathLike | None, verify_images: bool = False, names: Sequence[str] | None = None
) -> list[CheckRow]:
    """What is under the data root: a row for each of `names`, by default all datasets of the table that have a folder.

    Counts are compared with the known ones, and every image file must begin like an image; `verify_images` decodes
    them, which finds those that break off. Both show a progress bar on stderr.
    """
    specs = [find_spec(name) for name in names] if names else [spec for spec in DATASETS.values() if spec.folder]
    return [_check_one(spec, root, verify_images) for spec in specs]


def _check_one(spec: DatasetSpec, root: str | os.PathLike | None, verify_images: bool) -> CheckRow:
    try:
        split = load_split(spec.name, root)
    except ZooError as error:
        place = Path(root or "").expanduser()
        there = spec.folder is None or (place / spec.folder).exists() or _is_own_folder(spec, place)
        return CheckRow(spec.name, "broken" if there else "missing", str(error), spec.counts)
    found = (len(split.train), len(split.val), len(split.test))
    problems = []
    if spec.counts and found != spec.counts:
        problems.append(f"{found} train, val and test images instead of {spec.counts}")
    damaged = _damaged(split, load_image if verify_images else check_header)
    if damaged:
        problems.append(f"{_summary(damaged)} are damaged")
    message = f"{'; '.join(problems)}. {spec.where}" if problems else ""
    return CheckRow(spec.name, "broken" if problems else "ok", message, spec.counts, found, split.sha256, split.note)


def _damaged(split: Split, look: Callable[[str], object]) -> list[Item]:
    """The images that `look` raises a ZooError for."""

    def is_good(item: Item) -> bool:
        try:
            look(item.path)
        except ZooError:
            return False
        return True

    with ThreadPool() as pool:  # PIL decodes outside the interpreter lock
        good = track(
            pool.imap(is_good, split.items, chunksize=64),
            f"Looking at {split.name}",
            len(split.items),
            console=Console(stderr=True),
            transient=True,
        )
        return [item for item, fine in zip(split.items, good, strict=True) if not fine]
