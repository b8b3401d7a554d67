"""Images in Parquet files, as the Hugging Face Hub stores its datasets: FILE.parquet[?image=COLUMN]."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from dcp_zoo.data.remote import filesystem, is_url
from dcp_zoo.errors import ZooError, import_extra

PARQUET = "parquet://"
SUFFIX = ".parquet"


def is_parquet(name: str) -> bool:
    """Whether this is the name of a Parquet file, with or without a column."""
    return name.partition("?")[0].endswith(SUFFIX)


def parquet_images(name: str) -> list[tuple[str, str]]:
    """(name, path for `load_image`) of every row; only the file's metadata is read.

    The images are in the one column of encoded image files: binary, or the Hub's {bytes, path}. `?image=COLUMN` names
    it if there are several.

    Raises:
        ZooError: no such file, not Parquet, no such column, or no rows.
    """
    file, _, column = name.partition("?image=")
    try:
        table = _open(file)
    except OSError as error:  # pyarrow's errors for damaged files are ValueErrors and OSErrors
        raise ZooError(f"Cannot read {file}: {error}. Check the path.") from error
    except ValueError as error:
        raise ZooError(f"{file} is not a Parquet file: {error}.") from error
    with table:
        column = _image_column(file, column, table.schema_arrow)
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    found, row = [], 0
    for group, size in enumerate(sizes):
        for i in range(size):
            found.append((f"{file}#{row}", f"{PARQUET}{file}?{column}#{group}+{i}"))
            row += 1
    if not found:
        raise ZooError(f"{file} has no rows: pass one with images.")
    return found


def _open(file: str) -> Any:
    system, place = filesystem(file) if is_url(file) else (None, file)
    return import_extra("pyarrow.parquet", "data").ParquetFile(place, filesystem=system)


def _image_column(file: str, requested: str, schema: Any) -> str:
    types = import_extra("pyarrow", "data").types

    def has_images(kind: Any) -> bool:
        kind = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        return types.is_binary(kind) or types.is_large_binary(kind)

    possible = [field.name for field in schema if has_images(field.type)]
    chosen = [name for name in possible if name == requested] if requested else possible
    if len(chosen) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ZooError(
            f"{file}: cannot determine the column of encoded images (binary, or a struct with bytes) among {columns}. "
            f"Name it: {file}?image=COLUMN."
        )
    return chosen[0]


def read_cell(path: str) -> bytes:
    """The image file for a path `parquet://FILE?COLUMN#GROUP+ROW`."""
    file, _, place = path.removeprefix(PARQUET).rpartition("#")
    file, _, column = file.rpartition("?")
    group, _, row = place.partition("+")
    cell = _column(file, column, int(group))[int(row)].as_py()
    content = cell["bytes"] if isinstance(cell, dict) else cell
    if content is None:
        path = cell and cell.get("path")
        if not path:
            raise ValueError("the cell is empty")
        return Path(path).read_bytes()
    return content


@lru_cache(maxsize=1)
def _column(file: str, column: str, group: int) -> Any:
    """The images of one row group: rows are read in order, so that one group at a time is enough."""
    with _open(file) as table:
        return table.read_row_group(group, columns=[column]).column(0)
