"""Download datasets into CoOp's layout, once their terms have been agreed to."""

import json
from collections.abc import Sequence
from pathlib import Path

from dcp_zoo.data import imagenet
from dcp_zoo.data.archives import fetch_archive, size_of, unpack
from dcp_zoo.data.load import CheckRow, check
from dcp_zoo.data.progress import download_bar
from dcp_zoo.data.table import DATASETS, DatasetSpec, find_spec
from dcp_zoo.errors import ZooError
from dcp_zoo.files import write_file

ARCHIVES = ".downloads"  # under the data root: archives while they are needed, and the terms agreed to


def downloadable() -> list[str]:
    """The datasets that `download_dataset` can get, or says how to get."""
    return [name for name, spec in DATASETS.items() if spec.archives or name == "imagenet"]


def missing(names: Sequence[str], root: Path) -> list[DatasetSpec]:
    """The datasets of these names that are not complete under the data root; ZooError for one without a source."""
    specs = [find_spec(row.name) for row in check(root, names=names) if row.status != "ok"]
    for spec in specs:
        if spec.name not in downloadable():
            raise ZooError(f"{spec.name} cannot be downloaded: choose from {', '.join(downloadable())}. {spec.where}")
    return specs


def gigabytes(specs: Sequence[DatasetSpec]) -> float | None:
    """What the sources say they would send; None if one of them does not answer."""
    sizes = [size_of(archive) for spec in specs for archive in spec.archives]
    return None if None in sizes else sum(size for size in sizes if size) / 1e9


def download_dataset(spec: DatasetSpec, root: Path, imagenet_from: str | Path | None = None) -> CheckRow:
    """Get one dataset: fetch and unpack its archives, check it, and delete the archives.

    Args:
        spec: its entry in the table.
        root: the data root.
        imagenet_from: see `dcp_zoo.data.imagenet`.

    Returns:
        The row of `check`, whose status is "ok".

    Raises:
        ZooError: see `fetch_archive` and `unpack`; or the dataset is still not complete. Its archives are kept then.
    """
    assert spec.folder
    if spec.name == "imagenet":
        imagenet.arrange(root / spec.folder, imagenet_from)
    for archive in spec.archives:
        with download_bar(archive.filename) as advance:
            file = fetch_archive(archive, root / ARCHIVES, advance)
        unpack(archive, file, root / spec.folder)
    row = check(root, names=[spec.name])[0]
    if row.status != "ok":
        raise ZooError(f"{spec.name} was downloaded, but it is not complete: {row.message}")
    for archive in spec.archives:
        (root / ARCHIVES / archive.filename).unlink(missing_ok=True)
    return row


# --------------------------------------------------------------------------------------------------------------- terms


def agreed(root: Path) -> dict[str, str]:
    """The terms that were agreed to, by dataset."""
    file = root / ARCHIVES / "agreed.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def agree(specs: Sequence[DatasetSpec], root: Path) -> None:
    """Remember that the terms of these datasets were agreed to."""
    text = json.dumps(agreed(root) | {spec.name: spec.terms for spec in specs}, indent=1)
    write_file(root / ARCHIVES / "agreed.json", text, "choose another --data-root")
