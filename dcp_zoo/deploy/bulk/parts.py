"""The parts in which a run on many images writes its rows, and from which it resumes: FOLDER/_plan.json says what is
computed, FOLDER/part-* have the rows. A part that exists is complete; what a kill leaves half-written is hidden."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dcp_zoo.answers import Row
from dcp_zoo.deploy.bulk.job import Rows
from dcp_zoo.errors import ZooError, writing_to
from dcp_zoo.fields import Values
from dcp_zoo.files import LOCK, UNFINISHED, Content, locked, write_file

PLAN = "_plan.json"


@contextmanager
def unfinished_run(output: Path, plan: Values) -> Iterator["UnfinishedRun"]:
    """The finished rows of an output file, for this process alone; ZooError for rows of another plan."""
    folder = output.with_name(output.name + UNFINISHED)
    with locked(folder / LOCK) as free:  # the system releases it with the process
        if not free:
            raise ZooError(f"Another process is writing {folder}: wait for it, or choose another --output.")
        run = UnfinishedRun(folder)
        if run.done:
            before = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            if differ := [name.replace("_", " ") for name in plan if before.get(name) != plan[name]]:
                problem = f"{folder} holds the first rows of another run, which differs in {', '.join(differ)}."
                raise ZooError(f"{problem} Repeat that run's command, choose another --output, or delete this folder.")
        else:
            for old in folder.glob("[!.]*"):  # nothing to continue: any plan may begin
                old.unlink()
            write_file(folder / PLAN, json.dumps(plan, indent=1).encode())
        yield run


class UnfinishedRun:
    """The finished rows in a folder on this machine; `done` is their number.

    part-N.jsonl    rows, from row N on
    part-N.float32  their image features, if they are kept, written before them
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = sorted(folder.glob("part-*.jsonl"))
        self.done = sum(1 for _ in self.rows())

    @property
    def later(self) -> str:
        """Advice after an error."""
        return f"run the same command again later: {self.done:,} finished rows are kept"

    def keep(self, batches: Iterable[Rows], seconds: float) -> None:
        """Write parts at an interval, and what is left at the end or when the run is stopped."""
        rows, features, written = list[Row](), list[np.ndarray](), time.monotonic()
        try:
            for batch in batches:
                rows += batch.rows
                features += [] if batch.features is None else [*batch.features]
                if time.monotonic() - written >= seconds:
                    written, ready = time.monotonic(), (rows, features)
                    rows, features = [], []  # they wait no more, even if they cannot be written
                    self.add(*ready)
        finally:
            self.add(rows, features)

    def add(self, rows: list[Row], features: list[np.ndarray]) -> None:
        """Write the rows that follow the last ones."""
        if rows:
            file = self.folder / f"part-{self.done:010}.jsonl"
            if features:
                self.write(file.with_suffix(".float32"), np.stack(features, dtype=np.float32).tobytes())
            self.write(file, "".join(json.dumps(row) + "\n" for row in rows))
            self._files.append(file)
            self.done += len(rows)

    def write(self, path: Path, content: Content) -> None:
        """`write_file`; temporary files that a kill leaves in the folder are removed with it."""
        write_file(path, content, self.later, self.folder if path.parent == self.folder.parent else None)

    def rows(self) -> Iterator[Row]:
        for file in self._files:
            with file.open("rb") as lines:
                yield from map(json.loads, lines)

    def features(self) -> np.ndarray:
        """The features of all rows (N, E), joined in a file that is mapped into memory."""
        file = self.folder / "features"
        with writing_to(file, self.later), file.open("wb") as joined:
            joined.writelines(part.with_suffix(".float32").read_bytes() for part in self._files)
        return np.memmap(file, np.float32, "r").reshape(self.done, -1)

    def remove(self) -> None:
        """Delete the folder. It is renamed first: half of it would look like the start of a run."""
        old = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
        shutil.rmtree(self.folder.replace(old))
