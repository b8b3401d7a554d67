"""`inspect --fix`: a copy of the images with the changes that a person wrote into a table. Without torch."""

from pathlib import Path

from dcp_zoo.data import Split, load_labelled
from dcp_zoo.data.load import LabelFiles
from dcp_zoo.data.paths import check_outside
from dcp_zoo.data.readers import read_table
from dcp_zoo.data.splits import PARTS, shorten
from dcp_zoo.deploy.bulk.sorted_folders import sort_into
from dcp_zoo.errors import ZooError, as_zoo_error, nearest_hint, warn
from dcp_zoo.files import check_empty, check_writable, unfinished
from dcp_zoo.texts import LEAVE_OUT, NONE, class_folders


def fix(folder: str | Path, table: str | Path, output: str | Path, labels: LabelFiles = None) -> tuple[int, int]:
    """Write a copy of the images with the column `change` of the CSV file: another class, "leave out", or
    nothing. Returns how many were moved to another class, and how many left out."""
    place = Path(output)
    check_new(place, Path(folder))
    data = load_labelled("folder", folder, labels)
    if data.note:
        warn(data.note)
    changes, folders = _changes(Path(table), data), class_folders(data.classnames)
    left_out = sum(change == LEAVE_OUT for change in changes.values())
    if left_out == len(data.items):
        raise ZooError(f"{table} leaves out every image of {folder}: nothing is left to write.")
    with unfinished(place) as new:
        for part in dict.fromkeys(parts_of(data)):
            items = [item for item in getattr(data, part) if changes.get(item.key) != LEAVE_OUT]
            named = [folders[changes.get(item.key, data.classnames[item.label])] for item in items]
            sort_into([item.path for item in items], named, new / part if data.has_parts else new)
        if none := [item.path for item in data.none]:
            sort_into(none, [NONE] * len(none), new / PARTS[0] if data.has_parts else new)
        new.replace(place)
    return len(changes) - left_out, left_out


def check_new(place: Path, images: Path) -> None:
    """Raise ZooError for an output folder that exists, is among the images, or cannot be written."""
    check_empty(place)
    check_writable(place)
    check_outside(place, images, "--output")


def _changes(table: Path, data: Split) -> dict[str, str]:
    """What changes, by the key of the image."""
    with as_zoo_error(f"Cannot read {table} ({{}}): pass the inspection.csv of these images.", Exception):
        header, *cells = read_table(table)
        columns = header.index("file"), header.index("change")
        suggested = sum(bool(row[header.index("suggestion")]) for row in cells) if "suggestion" in header else 0
    rows = [(row[columns[0]], row[columns[1]].strip()) for row in cells]
    keys = {item.key: item for item in data.items}
    if new := [file for file, _ in rows if file not in keys]:
        raise ZooError(f"{table} lists images that are not in {data.place}: {shorten(new)}. Inspect the folder again.")
    if suggested and not any(change for _, change in rows):
        problem = f"The column change of {table} is empty, so that nothing would change: {suggested} suggestions wait"
        raise ZooError(f"{problem}. Write there those you agree with; to take all, copy the column suggestion there.")
    for _, change in rows:
        if change and change != LEAVE_OUT and change not in data.classnames:
            hint = nearest_hint(change, data.classnames)
            raise ZooError(f"{table}: {change!r} in the column change is neither a class nor {LEAVE_OUT!r}.{hint}")
    found = {keys[file].key: (change, keys[file]) for file, change in rows if change}
    return {key: change for key, (change, item) in found.items() if change != data.classnames[item.label]}


def parts_of(data: Split) -> list[str]:
    """The part of each of `data.items`."""
    return [part for part in PARTS for _ in getattr(data, part)]
