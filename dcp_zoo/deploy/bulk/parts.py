"""Finished rows, kept in numbered parts beside the output until all images are done: what a killed run continues from.

OUTPUT.parts/plan.json                   what is computed: another command may not continue it
OUTPUT.parts/lock                        locked while a process writes; the system releases it with the process
OUTPUT.parts/START-END.npy, then .jsonl  image features, if they are kept, and rows START to END - 1

Every file is written atomically and END is the next part's START, so the parts are the first rows without a gap.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.deploy.bulk.rows import Row, Rows
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import locked, write_atomically

SUFFIX = ".parts"


@contextmanager
def open_parts(output: Path, plan: dict[str, Any]) -> Iterator["Parts"]:
    """The parts of an output, for this process alone.

    Args:
        output: the file that they will be joined into.
        plan: what determines the rows, as plain JSON.

    Raises:
        ZooError: rows of another plan, another process that writes, or a folder that is not writable.
    """
    folder = output.with_name(output.name + SUFFIX)
    with ExitStack() as stack:
        try:
            acquired = stack.enter_context(locked(folder / "lock"))
        except OSError as error:
            raise cannot_write(folder, error) from error
        if not acquired:
            raise ZooError(f"Another process is writing {folder}: wait for it, or choose another --output.")
        parts = Parts(folder)
        _check_plan(parts, plan)
        yield parts


def _check_plan(parts: "Parts", plan: dict[str, Any]) -> None:
    """Store the plan of the first rows; ZooError if there are rows of another one."""
    file = parts.folder / "plan.json"
    if parts.done:
        check_same_plan(parts.folder, json.loads(file.read_bytes()) if file.exists() else {}, plan)
    else:
        parts.write(file, lambda temporary: Path(temporary).write_text(json.dumps(plan, indent=1)))


def check_same_plan(place: Path | str, found: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise ZooError if the rows at a place are of another plan than this one."""
    if differ := [name.replace("_", " ") for name in plan if found.get(name) != plan[name]]:
        raise ZooError(
            f"{place} holds the first rows of another run, which differs in {', '.join(differ)}. Repeat that run's "
            f"command, choose another --output, or delete {place}."
        )


class Parts:
    """The finished rows in a folder.

    Attributes:
        folder: where they are.
        done: their number.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spans = list(self._finished())
        self.done = self._spans[-1][1] if self._spans else 0

    def _finished(self) -> Iterator[tuple[int, int]]:
        """START and END of the parts, up to the first gap."""
        end = 0
        for path in sorted(self.folder.glob("[0-9]*.jsonl")):
            start, stop = map(int, path.stem.split("-"))
            if start != end:
                return
            yield start, (end := stop)

    def add(self, batches: list[Rows]) -> None:
        """Keep the rows that follow the last part."""
        rows = [row for batch in batches for row in batch.rows]
        span = self.done, self.done + len(rows)
        if batches[0].features is not None:
            features = np.concatenate([batch.features for batch in batches if batch.features is not None])
            self.write(self._path(span, ".npy"), lambda temporary: _save(temporary, features))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self.write(self._path(span, ".jsonl"), lambda temporary: Path(temporary).write_text(text))
        self._spans.append(span)
        self.done = span[1]

    def write(self, path: Path, write: Callable[[str], object]) -> None:
        """`write_atomically`; temporary files that a kill leaves beside the parts are removed with them."""
        try:
            write_atomically(path, write, self.folder if path.parent == self.folder.parent else None)
        except OSError as error:
            raise cannot_write(path, error, "run the same command again later: finished rows are kept") from error

    def rows(self) -> Iterator[Row]:
        """All rows, read one part at a time."""
        for span in self._spans:
            yield from map(json.loads, self._path(span, ".jsonl").read_text().splitlines())

    def features(self) -> Iterator[np.ndarray]:
        """The features (n, E) of each part."""
        for span in self._spans:
            yield np.load(self._path(span, ".npy"))

    def remove(self) -> None:
        """Delete the folder. It is renamed first: half of it would look like the start of a run."""
        old = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
        shutil.rmtree(self.folder.replace(old))

    def _path(self, span: tuple[int, int], suffix: str) -> Path:
        return self.folder / f"{span[0]:010}-{span[1]:010}{suffix}"


def _save(path: str, array: np.ndarray) -> None:
    with Path(path).open("wb") as file:  # np.save would add a suffix
        np.save(file, array)
