"""A table of results that grows while a script measures."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcp_zoo.cli.console import log


class GrowingTable:
    """A CSV file with these columns, created if needed; `key` are those that say what a row measured, so
    that a script resumes where it was stopped. Delete the file to measure again."""

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        self.path = path
        if not path.is_file():
            self._append([columns])
        with path.open() as file:
            rows = csv.DictReader(file)
            self.columns = rows.fieldnames or []
            self.known = {tuple(row[name] for name in key) for row in rows}

    def __contains__(self, key: Sequence[Any]) -> bool:
        return tuple(map(str, key)) in self.known

    def add(self, rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> None:
        """Write the rows, in order or by column, once all of them are measured, and show them."""
        rows = [[row.get(name) for name in self.columns] if isinstance(row, Mapping) else row for row in rows]
        self._append(rows)
        log("\n".join(" ".join(map(str, row)) for row in rows))

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
