"""What a run on many images writes: tables of predictions (.csv, .jsonl, .parquet), image features (.npz) and a contact
sheet. Rows are read several times and written in a stream, to need no memory."""

import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import numpy as np

from dcp_zoo.answers import Row, is_changed, label, written
from dcp_zoo.data.images import thumbnails
from dcp_zoo.fields import Values
from dcp_zoo.files import templates
from dcp_zoo.tables import NONE, write_csv


def _cells(row: Row) -> Values:
    """The values of a row by their columns. `class` is what was decided; `best`, of a run that rejects, is the most
    probable class, and `probability` its probability."""
    if "error" in row:
        return row
    first, *further = row["predictions"]
    flat = {name: row[name] for name in ("image", "rejected") if name in row} | {"class": label(row)}
    flat |= ({"best": first["class"]} if "rejected" in row else {}) | {"probability": first["probability"]}
    for rank, prediction in enumerate(further, 2):
        flat |= {f"class_{rank}": prediction["class"], f"probability_{rank}": prediction["probability"]}
    return flat | ({"alone": row["alone"]} if "alone" in row else {})


def _columns(rows: Iterable[Row]) -> list[str]:
    sound = ([*_cells(row)] for row in rows if "error" not in row)
    return [*next(sound, ["image", "class", "probability"]), "error"]  # all have the same


def _write_csv(path: str, rows: Iterable[Row]) -> None:
    names = _columns(rows)
    write_csv(path, names, ([cells.get(name) for name in names] for cells in map(_cells, rows)))


def _write_parquet(path: str, rows: Iterable[Row]) -> None:
    """As `Predictor` has them: an image that cannot be read is of class "", with the probability NaN."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kinds = {"probability": (pa.float32(), float("nan")), "rejected": (pa.bool_(), False)}
    columns = {name: kinds.get(re.sub(r"_\d+$", "", name), (pa.string(), "")) for name in _columns(rows)}
    columns |= {"rejected": kinds["rejected"]}
    schema, left = pa.schema([(name, kind) for name, (kind, _) in columns.items()]), iter(rows)
    blank: Values = {name: value for name, (_, value) in columns.items()}
    with ParquetWriter(path, schema) as file:
        while part := [blank | _cells(row) for row in islice(left, ROWS)]:
            for row in part:
                row |= {name: _plain(row[name]) for name in ("image", "error")}
            file.write_table(pa.Table.from_pylist(part, schema))


def _write_jsonl(path: str, rows: Iterable[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.writelines(json.dumps(written(row)) + "\n" for row in rows)


TABLES: dict[str, Callable[..., None]] = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
ROWS = 10_000  # of a Parquet file that are written at a time


def _plain(name: str) -> str:
    """A file's name with replacement characters for what is not valid in the system's encoding."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def write_features(path: str, names: Sequence[str], features: np.ndarray) -> None:
    """Arrays `image` (N,), see `_plain`, and `features` (N, E), as np.load reads them."""
    with open(path, "wb") as file:  # noqa: PTH123  np.savez would add a suffix to the path
        np.savez(file, image=np.array([*map(_plain, names)]), features=features)


PER_CLASS = 60  # images shown of a class: the sheet of a million images must open in a browser
SIZE = 128  # pixels of a thumbnail's longer side


def write_sheet(path: Path, images: Sequence[str], rows: Iterable[Row], temporary: str) -> None:
    """Write the contact sheet to a `temporary` file; pictures link to the images from `path`, its later place."""
    counts, least, errors = Counter[str](), dict[str, list[tuple[float, int, Row]]](), []
    for index, row in enumerate(rows):
        if "error" in row:
            errors.append(row)
            continue
        counts[label(row)] += 1
        shown = least.setdefault(label(row), [])  # a heap of the least certain
        entry = (-row["predictions"][0]["probability"], -index, row)
        (heapq.heappush if len(shown) < PER_CLASS else heapq.heappushpop)(shown, entry)

    classes = len(counts.keys() - {NONE})

    def pictures(name: str) -> Iterator[Values]:
        """Of one class, the least certain first."""
        shown = sorted(least[name], reverse=True)
        entries = [(images[-index], row) for _, index, row in shown]
        small = thumbnails((image for image, _ in entries), SIZE, quality=70)
        for (image, row), thumbnail in zip(entries, small, strict=True):
            yield {
                "thumbnail": thumbnail,
                "name": os.path.basename(image),  # noqa: PTH119
                "path": image,
                "link": _link(image, path.parent),
                "predictions": row["predictions"][:2],
                "rejected": row.get("rejected"),
                "alone": row["alone"] if is_changed(row) else None,
            }

    content = {
        "title": f"{len(images):,} image{'s' * (len(images) != 1)} in {classes} class{'es' * (classes != 1)}",
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
