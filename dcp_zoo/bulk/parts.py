"""Finished rows, kept in numbered parts beside the output until all images are done: what a killed run continues from.

OUTPUT.parts/plan.json                   what is computed: another command may not continue it
OUTPUT.parts/lock                        locked while a process writes; the system releases it with the process
OUTPUT.parts/START-END.npy, then .jsonl  image features, if they are kept, and rows START to END - 1

Every file is written atomically and END is the next part's START, so the parts are the first rows without a gap.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from dcp_zoo.bulk.rows import Row, Rows
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import write_atomically


class Parts:
    """The parts of an output, from an earlier run or none yet.

    Attributes:
        folder: where they are.
        done: number of rows in them.

    Args:
        output: the file that they will be joined into.
        plan: what determines the rows, as plain JSON.

    Raises:
        ZooError: parts of another plan, or a folder that is not writable.
    """

    def __init__(self, output: Path, plan: dict[str, Any]) -> None:
        self.folder = output.with_name(output.name + ".parts")
        file = self.folder / "plan.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(file.read_bytes()) if file.exists() else None
            if found is None:
                write_atomically(file, lambda temporary: Path(temporary).write_text(json.dumps(plan, indent=1)))
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        if found not in (None, plan):
            differ = [name.replace("_", " ") for name in plan if found.get(name) != plan[name]]
            raise ZooError(
                f"{self.folder} holds the first rows of another run, which differs in {', '.join(differ)}. Repeat that "
                f"run's command, choose another --output, or delete {self.folder}."
            )
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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process write; ZooError if one does."""
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ZooError(
                f"Another process is writing {self.folder}: wait for it, or choose another --output."
            ) from None
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            raise cannot_write(self.folder, error) from error
        try:
            yield
        finally:
            lock.release()

    def add(self, batches: list[Rows]) -> None:
        """Keep the rows that follow the last part."""
        rows = [row for batch in batches for row in batch.rows]
        span = self.done, self.done + len(rows)
        try:
            if batches[0].features is not None:
                features = np.concatenate([batch.features for batch in batches if batch.features is not None])
                write_atomically(self._path(span, ".npy"), lambda temporary: _save(temporary, features))
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(self._path(span, ".jsonl"), lambda temporary: Path(temporary).write_text(text))
        except OSError as error:
            raise cannot_write(self.folder, error, "then run the same command again: finished rows are kept") from error
        self._spans.append(span)
        self.done = span[1]

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
        shutil.rmtree(self.folder.replace(self.folder.with_name(f".{self.folder.name}.old")))

    def _path(self, span: tuple[int, int], suffix: str) -> Path:
        return self.folder / f"{span[0]:010}-{span[1]:010}{suffix}"


def _save(path: str, array: np.ndarray) -> None:
    with Path(path).open("wb") as file:  # np.save would add a suffix
        np.save(file, array)
