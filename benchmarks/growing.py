"""A table of results that grows while a script measures."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dcp_zoo.cli.console import log


class GrowingTable:
    """A CSV file with these columns, created if needed; `key` are those that say what a row measured, so that a script
    resumes where it was stopped."""

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        self.path = path
        if not path.is_file():
            self._append([columns])
        with path.open() as file:
            self.known = {tuple(row[name] for name in key) for row in csv.DictReader(file)}

    def __contains__(self, key: Sequence[Any]) -> bool:
        return tuple(map(str, key)) in self.known

    def add(self, rows: Iterable[Sequence[Any]]) -> None:
        """Write the rows, once all of them are measured, and show them."""
        rows = list(rows)
        self._append(rows)
        log("\n".join(" ".join(map(str, row)) for row in rows))

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
