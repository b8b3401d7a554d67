"""A copy of a folder with what a person changed in the CSV file of its inspection."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from dcp_zoo.data import Split, load_labelled
from dcp_zoo.data.archives import is_archive
from dcp_zoo.data.find import Found
from dcp_zoo.data.splits import shorten
from dcp_zoo.deploy.bulk.outputs import inert
from dcp_zoo.deploy.bulk.sort import sort_into
from dcp_zoo.errors import ZooError, nearest_hint
from dcp_zoo.inspection.inspect import LEAVE_OUT, parts_of


def fix(folder: str | Path, table: str | Path, output: str | Path, labels: str | Path | None = None) -> tuple[int, int]:
    """Write a copy of a folder of labelled images, as symbolic links where the system has them. The folder itself stays
    as it is. Returns how many images were moved to another class, and how many left out.

    Args:
        folder, labels: see `inspect`.
        table: the CSV file of `Inspection.write`. Its column `change` holds the name of another class, "leave out", or
            nothing.
        output: the new folder.

    Raises:
        ZooError: a table of other images or with unknown classes, or an output that exists or is not writable.
    """
    place = Path(output)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ZooError(f"{place} exists already: choose a new folder for --output.")
    if place.resolve().is_relative_to(Path(folder).resolve()):
        raise ZooError(f"{place} is among the images of {folder}: choose a folder elsewhere for --output.")
    data = load_labelled("folder", folder, labels)
    changes = _read(Path(table), data)
    link = os.name != "nt" and not is_archive(folder)  # what an archive was unpacked to goes when the process ends
    for part in dict.fromkeys(parts_of(data)):
        items = [item for item in getattr(data, part) if changes.get(item.key) != LEAVE_OUT]
        classes = [changes.get(item.key, data.classnames[item.label]) for item in items]
        rows: Iterable[dict] = ({"predictions": [{"class": name}]} for name in classes)
        sort_into([Found(item.key, item.path) for item in items], rows, place / part if data.has_parts else place, link)
    left_out = sum(change == LEAVE_OUT for change in changes.values())
    return len(changes) - left_out, left_out


def _read(table: Path, data: Split) -> dict[str, str]:
    """What changes, by the key of the image."""
    try:
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = [(row["file"], row["change"].strip()) for row in csv.DictReader(file)]
    except (OSError, KeyError, AttributeError, csv.Error) as error:
        raise ZooError(f"Cannot read {table} ({error}): pass the inspection.csv of these images.") from error
    keys = {inert(item.key): item for item in data.items}
    if unknown := [file for file, _ in rows if file not in keys]:
        raise ZooError(
            f"{table} lists images that are not in {data.place}: {shorten(unknown)}. Inspect the folder again."
        )
    for _, change in rows:
        if change and change != LEAVE_OUT and change not in data.classnames:
            hint = nearest_hint(change, data.classnames)
            raise ZooError(f"{table}: {change!r} in the column change is neither a class nor {LEAVE_OUT!r}.{hint}")
    found = {keys[file].key: (change, keys[file]) for file, change in rows if change}
    return {key: change for key, (change, item) in found.items() if change != data.classnames[item.label]}
