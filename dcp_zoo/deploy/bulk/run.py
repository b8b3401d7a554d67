"""From many images to files: a run that resumes where a killed one stopped, from the finished rows beside the output:

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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.answers import Row, label
from dcp_zoo.data.films import is_frame
from dcp_zoo.data.find import Found
from dcp_zoo.data.progress import Progress, no_progress
from dcp_zoo.deploy.bulk import outputs as writers
from dcp_zoo.deploy.bulk.classify import Job, Rows, Summary, check_same_plan
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import check_writable, locked, write_file

UNFINISHED = ".unfinished"
PART_SECONDS = 20.0  # of work that a kill may lose


@dataclass(frozen=True)
class Outputs:
    table: Path  # predictions: .csv, .jsonl or .parquet
    features: Path | None = None  # image features, in the order of the table: .npz or .parquet
    sheet: Path | None = None  # an HTML contact sheet
    sort_into: Path | None = None  # a folder that gets a folder of images per class
    link: bool = False  # symbolic links instead of copies there

    def check(self, images: Sequence[Found]) -> None:
        """Raise ZooError for unknown suffixes, results that exist, and places that cannot be written."""
        writers.check_suffix(self.table, writers.TABLES, "--output")
        if self.features:
            writers.check_suffix(self.features, writers.FEATURES, "--features")
        if self.sort_into:
            writers.check_sortable(images, self.sort_into)
        files = list(filter(None, (self.table, self.features, self.sheet)))
        for file in files:
            if file.exists() and not self.table.with_name(self.table.name + UNFINISHED).exists():
                raise ZooError(f"{file} exists already: delete it, or choose another file.")
            if files.count(file) > 1:
                raise ZooError(f"{file} is named twice: choose another file for one of the outputs.")
        for folder in {file.parent for file in files} | ({self.sort_into} if self.sort_into else set()):
            check_writable(folder)


def run(
    images: Sequence[Found],
    job: Job,
    outputs: Outputs,
    *,
    progress: Progress = no_progress,
    part_seconds: float = PART_SECONDS,
) -> Summary:
    """Classify images and write the outputs, which are checked first. Stopped in any way, even by a kill, the same call
    resumes: finished rows are kept, every `part_seconds`. ZooError for an output that exists, is not writable or
    belongs to another run."""
    outputs.check(images)
    plan = job.plan_of((image.name for image in images), features=outputs.features is not None)
    with unfinished_run(outputs.table, plan) as rows:
        resumed = rows.done
        if resumed < len(images):
            batches = job.classify(images[resumed:], job.load())
            rows.keep(
                progress(batches, "images", len(images), done=resumed, size=lambda it: len(it.rows)), part_seconds
            )
        failed = _finish(rows, images, outputs)
    rows.remove()
    return Summary(len(images), resumed, failed)


def _finish(rows: "UnfinishedRun", images: Sequence[Found], outputs: Outputs) -> int:
    """Write the outputs, the table last: it says that the run is complete. Returns how many images cannot be read."""
    if outputs.features:
        names = [writers.as_unicode(image.name) for image in images]
        write = writers.FEATURES[outputs.features.suffix]
        rows.write(outputs.features, lambda temporary: write(temporary, names, rows.features()))
    if outputs.sheet:
        rows.write(outputs.sheet, partial(writers.write_sheet, outputs.sheet, images, rows.rows()))
    if outputs.sort_into:
        classes = (None if "error" in row else label(row) for row in rows.rows())
        writers.sort_into((image.path for image in images), classes, outputs.sort_into, outputs.link)
    write_table = writers.TABLES[outputs.table.suffix]
    rows.write(outputs.table, lambda temporary: write_table(temporary, rows.rows(), writers.columns(rows.rows())))
    return sum("error" in row for row in rows.rows())


@contextmanager
def unfinished_run(output: Path, plan: dict[str, Any]) -> Iterator["UnfinishedRun"]:
    """The finished rows of an output file, for this process alone; ZooError for rows of another plan."""
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
    """The finished rows in a folder; `done` is their number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._rows, self._features = folder, folder / "rows.jsonl", folder / "features"
        self.done = self._end = 0  # rows, and their bytes
        if self._rows.exists():
            with self._rows.open("rb") as lines, suppress(ValueError, TypeError):  # of a line that is no row
                done = end = 0
                for line in takewhile(lambda line: line.endswith(b"\n"), lines):
                    done, end = done + 1, end + len(line)
                    if not is_frame(json.loads(line)["image"]):  # a film begins again: its last row is their mean
                        self.done, self._end = done, end

    @property
    def later(self) -> str:
        """Advice after an error."""
        return f"run the same command again later: {self.done:,} finished rows are kept"

    def keep(self, batches: Iterable[Rows], seconds: float) -> None:
        """Keep rows at an interval, and what is left at the end or when the run is stopped."""
        waiting: list[Rows] = []
        written = time.monotonic()
        try:
            for batch in batches:
                waiting.append(batch)
                if time.monotonic() - written >= seconds:
                    self.add(waiting)
                    waiting, written = [], time.monotonic()
        finally:
            if waiting:
                self.add(waiting)

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
        """`write_file`; temporary files that a kill leaves in the folder are removed with it."""
        write_file(path, write, self.later, self.folder if path.parent == self.folder.parent else None)

    def rows(self) -> Iterator[Row]:
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


def _write_at(path: Path, position: int, content: bytes) -> None:
    """Write behind what is kept, over what a kill has left there."""
    with path.open("ab") as file:
        file.truncate(position)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
