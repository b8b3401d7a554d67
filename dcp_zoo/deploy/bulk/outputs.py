"""Files of results: tables of predictions (.csv, .jsonl, .parquet) and image features (.npz, .parquet).

Rows are written in a stream, and features from a file mapped into memory, which thus grows with the names alone.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from dcp_zoo.deploy.bulk.job import Row
from dcp_zoo.errors import ZooError, import_extra

GROUP_ROWS = 10_000  # of Parquet
IMAGES = "image"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which a spreadsheet's formula may begin


def check_suffix(path: Path, writers: dict[str, Any], option: str) -> None:
    """Raise ZooError unless a file's suffix names one of the formats, and what writes it is installed."""
    if path.suffix not in writers:
        raise ZooError(f"{option} {path}: its suffix must be {' or '.join(writers)}.")
    if path.suffix == ".parquet":
        import_extra("pyarrow", "data")


def columns(rows: Iterable[Row]) -> list[str]:
    """The columns of a table of these rows: the best class has no number."""
    row = next((row for row in rows if "error" not in row), {"predictions": [None]})  # all others are like it
    return column_names(len(row["predictions"]), "rejected" in row)


def column_names(ranks: int, rejects: bool) -> list[str]:
    """The columns of a table with so many classes per image, and of rejections if `rejects`."""
    suffixes = ["", *(f"_{rank}" for rank in range(2, ranks + 1))]
    named = [f"{name}{suffix}" for suffix in suffixes for name in ("class", "probability")]
    return [IMAGES, *(["rejected"] if rejects else []), *named, "error"]


def _cells(row: Row, columns: list[str]) -> list[Any]:
    """A row in the order of the columns; None where there is no value."""
    flat = dict(row)
    for rank, prediction in enumerate(flat.pop("predictions", []), 1):
        flat |= {f"{name}_{rank}" if rank > 1 else name: value for name, value in prediction.items()}
    return [flat.get(column) for column in columns]


# -------------------------------------------------------------------------------------------------------------- tables


def _write_csv(path: str, rows: Iterable[Row], columns: list[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([inert(cell) for cell in _cells(row, columns)] for row in rows)


def inert(cell: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula, and that can be encoded."""
    if not isinstance(cell, str):
        return cell
    cell = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", cell)  # not those that stand for bytes of a file name
    return f"'{cell}" if cell.startswith(FORMULA) else cell


def _write_jsonl(path: str, rows: Iterable[Row], columns: list[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_parquet(path: str | IO[bytes], rows: Iterable[Row], columns: list[str]) -> None:
    arrow, parquet = import_extra("pyarrow", "data"), import_extra("pyarrow.parquet", "data")
    types = {"probability": arrow.float64(), "rejected": arrow.bool_()}
    schema = arrow.schema([(name, types.get(name.partition("_")[0], arrow.string())) for name in columns])
    with parquet.ParquetWriter(path, schema) as writer:
        rows = iter(rows)
        while chunk := list(islice(rows, GROUP_ROWS)):
            cells = ([as_unicode(c) if isinstance(c, str) else c for c in _cells(row, columns)] for row in chunk)
            values = zip(*cells, strict=True)
            writer.write_table(arrow.table([list(column) for column in values], schema=schema))


TABLES: dict[str, Callable[[Any, Iterable[Row], list[str]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


# ------------------------------------------------------------------------------------------------------------ features


def _features_npz(path: str, names: list[str], features: np.ndarray) -> None:
    """Arrays `image` (N,) and `features` (N, E), as np.load reads them."""
    with open(path, "wb") as file:  # noqa: PTH123  np.savez would add a suffix to the path
        np.savez(file, image=np.array(names), features=features)


def _features_parquet(path: str, names: list[str], features: np.ndarray) -> None:
    """Columns `image` and `features`, a list of floats."""
    arrow, parquet = import_extra("pyarrow", "data"), import_extra("pyarrow.parquet", "data")
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(features.ravel()), features.shape[1])
    parquet.write_table(arrow.table({IMAGES: names, "features": lists}), path, row_group_size=GROUP_ROWS)


FEATURES: dict[str, Callable[[str, list[str], np.ndarray], None]] = {
    ".npz": _features_npz,
    ".parquet": _features_parquet,
}


def as_unicode(name: str) -> str:
    """A name with replacement characters for what is not valid in the system's encoding."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)
