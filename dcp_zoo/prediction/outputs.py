"""What a run on many images writes: tables of predictions (.csv, .jsonl, .parquet), image features (.npz)
and a contact sheet. Rows are read several times and written in a stream, to need no memory."""

import heapq
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import numpy as np

from dcp_zoo.answers import Row, cells, table
from dcp_zoo.data.images import thumbnails
from dcp_zoo.fields import Values
from dcp_zoo.pages import templates
from dcp_zoo.tables import NONE, write_csv


def _columns(rows: Iterable[Row]) -> list[str]:
    """The columns of all rows, which are the same for all images that can be read."""
    answers = (cells(row) for row in rows if "error" not in row)
    return [*next(answers, ("image", "class", "probability")), "error"]


def _write_csv(path: str, rows: Iterable[Row]) -> None:
    columns = _columns(rows)
    write_csv(path, columns, ([values.get(name) for name in columns] for values in map(cells, rows)))


def _write_parquet(path: str, rows: Iterable[Row]) -> None:
    """As `Predictor` has them: an image that cannot be read is of class "", with the probability NaN."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    names = dict.fromkeys([*_columns(rows), "rejected"])
    remaining = iter(rows)
    with ParquetWriter(path, pyarrow.table(table([], names)).schema) as file:
        while True:
            part = [cells(row) for row in islice(remaining, ROWS)]
            if not part:
                break
            columns = table(part, names)
            for name in ("image", "error"):
                columns[name] = [*map(_valid, columns[name])]
            file.write_table(pyarrow.table(columns))


def _write_jsonl(path: str, rows: Iterable[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.writelines(json.dumps(row) + "\n" for row in rows)


TABLES: dict[str, Callable[..., None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
ROWS = 10_000  # of a Parquet file that are written at a time


def _valid(name: str) -> str:
    """A file's name with replacement characters for what is not valid in the system's encoding."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def write_features(path: str, names: Sequence[str], features: np.ndarray) -> None:
    """Arrays `image` (N,), see `_valid`, and `features` (N, E), as np.load reads them."""
    with open(path, "wb") as file:  # noqa: PTH123  np.savez would add a suffix to the path
        np.savez(file, image=np.array([*map(_valid, names)]), features=features)


PER_CLASS = 60  # images shown of a class: the sheet of a million images must open in a browser
SIZE = 128  # pixels of a thumbnail's longer side


def write_sheet(path: Path, rows: Iterable[Row], temporary: str) -> None:
    """Write the contact sheet to a `temporary` file; its links to the images are relative to `path`."""
    counts = Counter[str]()
    least_certain = defaultdict[str, list[tuple[float, int, Row]]](list)  # by class, a heap
    errors = []
    for position, row in enumerate(rows):
        if "error" in row:
            errors.append(row)
            continue
        counts[row["class"]] += 1
        heap = least_certain[row["class"]]
        heapq.heappush(heap, (-row["predictions"][0]["probability"], -position, row))
        if len(heap) > PER_CLASS:
            heapq.heappop(heap)

    def pictures(name: str) -> Iterator[Values]:
        """The answers of one class, the least certain first."""
        shown = [row for *_, row in sorted(least_certain[name], reverse=True)]
        small = thumbnails((row["image"] for row in shown), SIZE)
        for row, thumbnail in zip(shown, small, strict=True):
            file = row["image"]
            yield row | {"name": Path(file).name, "link": _link(file, path.parent), "thumbnail": thumbnail}

    images = counts.total() + len(errors)
    content = {
        "title": f"Images: {images:,}, classes: {len(counts.keys() - {NONE})}",
        "groups": sorted(counts.items(), key=lambda group: (group[0] == NONE, group[0])),
        "pictures": pictures,
        "errors": errors,
    }
    page = templates(__package__).get_template("sheet.html.jinja").stream(content, per_class=PER_CLASS)
    page.dump(temporary, "utf-8", "replace")


def _link(path: str, folder: Path) -> str:
    """The address of an image file on a page in the folder."""
    try:
        return quote(os.fsencode(os.path.relpath(path, folder)))
    except ValueError:  # another drive of Windows
        return Path(path).absolute().as_uri()
