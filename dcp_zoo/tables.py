"""Names of users in CSV files and in lists: what is written here is read back the same."""

import codecs
import csv
import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from dcp_zoo.errors import warn
from dcp_zoo.files import read_plain

# what stands in tables in place of a class
NONE = "none of these"
LEAVE_OUT = "leave out"
STRATUM = "stratum"  # a column of the labels file of `eval --label`
INSPECTION_PAGE = "inspection.html"
INSPECTION_TABLE = "inspection.csv"
_FORMULA = r"'*[=+\-@\t\r]"  # with which a spreadsheet's formula may begin, also after the mark of `inert`
# an entry of a list, in quotes or with braces in it, and what ends it
_ENTRY = re.compile(r'\s*("(?:[^"]|"")*"|(?:\{[^{}\n]*\}|[^,\n])*)\s*[,\n]')


def is_reserved(name: str) -> bool:
    """Whether a name is an answer besides the classes, so that it can be none of them."""
    return name.strip().casefold() in (NONE, LEAVE_OUT)


def is_none(name: str) -> bool:
    return name.strip().casefold() == NONE


def inert(cell: object) -> object:
    """A cell that a spreadsheet does not take for a formula, by the mark ', and that can be encoded."""
    if not isinstance(cell, str):
        return cell
    cell = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", cell)  # not those that stand for bytes of a file name
    return f"'{cell}" if re.match(_FORMULA, cell) else cell


def active(cell: str) -> str:
    """A cell without the mark of `inert`."""
    return re.sub(f"^'(?={_FORMULA})", "", cell)


def write_csv(path: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table that `read_csv` reads back, with the byte order mark by which Excel knows UTF-8."""
    with open(path, "w", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:  # noqa: PTH123
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(map(inert, row) for row in rows)


def read_csv(file: Path) -> list[list[str]]:
    """The rows of a CSV file, but for empty ones, filled up: of `write_csv`, or as spreadsheets save
    them, with commas, semicolons or tabs. OSError or ValueError for what is no such file."""
    text = read_text(file)
    first = text.partition("\n")[0]
    try:
        separator = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        spaced = f"{separator} " in first
        lines = csv.reader(StringIO(text, newline=""), delimiter=separator, skipinitialspace=spaced, strict=True)
        rows = [list(map(active, row)) for row in lines if any(row)]
    except csv.Error as error:
        raise ValueError(error) from error
    return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, in UTF-16 with its mark, or otherwise, with a warning, in
    Windows-1252. Where a mark says that it is UTF-8, other bytes are those of a file name. OSError or
    ValueError if it cannot be read."""
    data = read_plain(file)
    if data.startswith(codecs.BOM_UTF8):
        return data.decode("utf-8-sig", "surrogateescape")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    warn(f"{file} was read as Windows-1252, not UTF-8: check its names, or save it in UTF-8.")
    return text


def split_list(text: str) -> list[str]:
    """The entries of a list, separated by commas or line breaks outside of double quotes and braces."""
    entries = []
    for match in _ENTRY.finditer(f"{text.strip()}\n"):
        entry = match[1].strip()
        is_quoted = len(entry) > 1 and entry.startswith('"') and entry.endswith('"')
        entries.append(entry[1:-1].replace('""', '"') if is_quoted else entry)
    return entries


def quoted(name: str) -> str:
    """A name as an entry for `split_list`, in quotes if it needs them."""
    if not re.search(r'[",{}\n]|\A\s|\s\Z', name):
        return name
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
