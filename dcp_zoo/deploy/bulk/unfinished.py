"""Finished rows, kept beside the output until all images are done: what a killed run continues from.

OUTPUT.unfinished/plan.json   what is computed: another command may not continue it
OUTPUT.unfinished/lock        locked while a process writes; the system releases it with the process
OUTPUT.unfinished/rows.jsonl  the rows
OUTPUT.unfinished/features    their image features, if they are kept: float32, without a header

Both are appended to, the features first, and forced onto the disk. So what a kill or a power cut leaves half-written is
at the end of a file, where the next run writes over it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.deploy.bulk.job import check_same_plan
from dcp_zoo.deploy.bulk.rows import Row, Rows
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import locked, write_atomically, write_file

UNFINISHED = ".unfinished"


@contextmanager
def unfinished_run(output: Path, plan: dict[str, Any]) -> Iterator["UnfinishedRun"]:
    """The finished rows of an output, for this process alone.

    Args:
        output: the file that they will be written to.
        plan: what determines the rows, as plain JSON.

    Raises:
        ZooError: rows of another plan, another process that writes, or a folder that is not writable.
    """
    folder = output.with_name(output.name + UNFINISHED)
    with locked(folder / "lock") as free:
        if not free:
            raise ZooError(f"Another process is writing {folder}: wait for it, or choose another --output.")
        run, file = UnfinishedRun(folder), folder / "plan.json"
        if run.done:
            check_same_plan(folder, json.loads(file.read_bytes()) if file.exists() else {}, plan)
        else:
            write_file(file, json.dumps(plan, indent=1), run.later)
        yield run


class UnfinishedRun:
    """The finished rows in a folder.

    Attributes:
        folder: where they are.
        done: their number.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._rows, self._features = folder, folder / "rows.jsonl", folder / "features"
        self.done = self._end = 0  # rows, and their bytes
        if self._rows.exists():
            with self._rows.open("rb") as lines:
                for line in lines:
                    if not _is_complete(line):
                        break
                    self.done, self._end = self.done + 1, self._end + len(line)

    @property
    def later(self) -> str:
        """Advice after an error."""
        return f"run the same command again later: {self.done:,} finished rows are kept"

    def add(self, batches: list[Rows]) -> None:
        """Keep the rows that follow the last ones; all of them or none."""
        rows = [row for batch in batches for row in batch.rows]
        features = [batch.features for batch in batches if batch.features is not None]
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            if features:
                values = np.concatenate(features, dtype=np.float32)
                _write_at(self._features, self.done * values[0].nbytes, values.tobytes())
            _write_at(self._rows, self._end, text)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._rows, self._end)
            raise cannot_write(self.folder, error, self.later) from error
        self.done, self._end = self.done + len(rows), self._end + len(text)

    def write(self, path: Path, write: Callable[[str], object]) -> None:
        """`write_atomically`; temporary files that a kill leaves in the folder are removed with it."""
        try:
            write_atomically(path, write, self.folder if path.parent == self.folder.parent else None)
        except OSError as error:
            raise cannot_write(path, error, self.later) from error

    def rows(self) -> Iterator[Row]:
        """All rows, read one by one."""
        with self._rows.open("rb") as lines:
            yield from map(json.loads, lines)

    def features(self) -> np.ndarray:
        """The features of all rows (N, E), in a file that is mapped into memory."""
        return np.memmap(self._features, np.float32, "r").reshape(self.done, -1)

    def remove(self) -> None:
        """Delete the folder. It is renamed first: half of it would look like the start of a run."""
        old = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
        shutil.rmtree(self.folder.replace(old))


def _is_complete(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _write_at(path: Path, position: int, content: bytes) -> None:
    """Write behind what is kept, over what a kill has left there."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(position)
        file.seek(position)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
