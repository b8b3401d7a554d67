"""Loading a data set by name, and checking what is on disk."""

import os
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dcp_zoo.data.images import load_image
from dcp_zoo.data.splits import Item, Split
from dcp_zoo.data.table import DATASETS, DatasetSpec, classnames, find_spec
from dcp_zoo.errors import ZooError


def load_split(name: str, root: str | os.PathLike | None = None) -> Split:
    """The data set `name` (a key of `DATASETS`) from the data root, which holds a folder for each data set in CoOp's
    layout (`root/caltech-101/...`); the data set's own folder will do too. `folder` reads `root` itself, one folder a
    class; `digits` needs no root.

    Raises ZooError for an unknown name, for files that are not there, and for a split that is malformed. Warns if the
    split's class names are not those of `classnames(name)`, which the zoo's heads were trained for.
    """
    spec = find_spec(name)
    split = spec.reader(spec, _locate(spec, root))
    missing = _missing(split) if spec.split_file else []
    if missing:
        raise ZooError(f"{name}: {_summary(missing)} are missing. {spec.where}")
    if spec.names:
        _warn_if_renamed(split, classnames(name))
    return split


def _locate(spec: DatasetSpec, root: str | os.PathLike | None) -> Path:
    """The data set's folder; ZooError names the first path that is not there."""
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


def _missing(split: Split) -> list[Item]:
    return [item for item in split.items if not Path(item.path).exists()]


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
    """What `check` found of one data set. `found` and `expected` are train, val and test sizes."""

    name: str
    status: str  # "ok", "missing" (nothing there) or "broken" (see message)
    found: tuple[int, int, int] | None
    expected: tuple[int, int, int] | None
    message: str


def check(root: str | os.PathLike, verify_images: bool = False) -> list[CheckRow]:
    """What is under the data root: a row for each of the 11 data sets and the 4 ImageNet variants.

    Counts are compared with CoOp's. `verify_images` decodes every image, with a progress bar on stderr, and reports the
    damaged ones.
    """
    return [_check_one(spec, Path(root), verify_images) for spec in DATASETS.values() if spec.counts]


def _check_one(spec: DatasetSpec, root: Path, verify_images: bool) -> CheckRow:
    try:
        split = load_split(spec.name, root)
    except ZooError as error:
        there = (root / (spec.folder or "")).exists() or _is_own_folder(spec, root)
        return CheckRow(spec.name, "broken" if there else "missing", None, spec.counts, str(error))
    found = (len(split.train), len(split.val), len(split.test))
    problems = []
    if found != spec.counts:
        problems.append(f"{found} train, val and test images instead of {spec.counts}")
    damaged = _damaged(split) if verify_images else []
    if damaged:
        problems.append(f"{_summary(damaged)} are damaged")
    message = f"{'; '.join(problems)}. {spec.where}" if problems else ""
    return CheckRow(spec.name, "broken" if problems else "ok", found, spec.counts, message)


def _damaged(split: Split) -> list[Item]:
    with ThreadPool() as pool:  # PIL decodes outside the interpreter lock
        readable = pool.imap(_is_readable, split.items, chunksize=64)
        progress = track(
            readable, f"Decoding {split.name}", len(split.items), console=Console(stderr=True), transient=True
        )
        return [item for item, good in zip(split.items, progress, strict=True) if not good]


def _is_readable(item: Item) -> bool:
    try:
        load_image(item.path)
    except ZooError:
        return False
    return True
