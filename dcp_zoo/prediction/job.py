"""A run on many images: what it computes of each, and its way to files on this machine, by parts in the folder
OUTPUT.unfinished, from which it resumes: FOLDER/_plan.json says what is computed, FOLDER/part-* have the rows. A part
that exists is complete; what a kill leaves half-written is hidden."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcp_zoo.answers import Outputs, Row, is_changed, label, top_classes
from dcp_zoo.data.images import Progress, no_progress
from dcp_zoo.errors import ZooError, writing_to
from dcp_zoo.fields import Values
from dcp_zoo.files import LOCK, UNFINISHED, Content, check_output, locked, write_file
from dcp_zoo.prediction import Predictor
from dcp_zoo.prediction import outputs as writers
from dcp_zoo.prediction.together import refined
from dcp_zoo.tables import NONE

NAMED = 10  # of the images that cannot be read
PLAN = "_plan.json"


class Rows(NamedTuple):
    """The rows of one batch, and their features (n, E) if they are kept, with `Job.together` also logits (n, E + C)."""

    rows: list[Row]
    features: np.ndarray | None


@dataclass(frozen=True)
class Job:
    """What a run computes of each image."""

    top_k: int = 5  # classes per image
    batch_size: int = 32  # does not affect the predictions
    together: bool = False  # refine the answers by each other, see `refined`, with a predictor that keeps features

    def classify(self, images: Sequence[str], predictor: Predictor) -> Iterator[Rows]:
        """Classify images in order, batch by batch."""
        left = iter(images)
        for errors, found in predictor.batches(images, self.batch_size):
            answers = iter(found.rows(predictor.classnames, self.top_k))
            rows = [
                {"image": image} | ({"error": str(error)} if error else next(answers))
                for error, image in zip(errors, left, strict=False)
            ]
            kept = None
            if found.features is not None:
                computed = np.concatenate([found.features, found.logits], 1) if self.together else found.features
                kept = np.full((len(errors), computed.shape[1]), np.nan, np.float32)
                kept[[error is None for error in errors]] = computed
            yield Rows(rows, kept)

    def collect(self, batches: Iterable[Rows], classnames: Sequence[str]) -> list[Row]:
        """The rows of all batches of `classify`, refined if they are to be."""
        found = list(batches)
        rows = [row for batch in found for row in batch.rows]
        kept = [batch.features for batch in found if batch.features is not None]
        return self.refined(rows, np.concatenate(kept), classnames) if self.together else rows

    def refined(
        self, rows: list[Row], kept: np.ndarray, classnames: Sequence[str], progress: Progress = no_progress
    ) -> list[Row]:
        """The rows with the answers that `together` gives, from what `classify` kept of them; "alone" is the class that
        each image had without the others. Those of no class, or that cannot be read, stay so and lend nothing."""
        rows = [row if "error" in row else row | {"alone": label(row)} for row in rows]
        own = np.array(["error" not in row and label(row) != NONE for row in rows], bool)
        features, logits = np.split(kept, [-len(classnames)], axis=1)
        probabilities = refined(Outputs(logits, features=features), own, progress)
        ranked = top_classes(probabilities, classnames, self.top_k)
        return [row | {"predictions": best} if mine else row for row, best, mine in zip(rows, ranked, own, strict=True)]


@dataclass(frozen=True)
class Summary:
    """What became of the images of a run."""

    images: int
    resumed: int  # that an earlier run had done
    failed: int  # that cannot be read
    changed: Sequence[Row] = ()  # that other images changed, of answers together
    errors: Sequence[str] = field(default=(), compare=False)  # of the first `NAMED` of those


@dataclass(frozen=True)
class OutputFiles:
    table: Path  # predictions: .csv or .jsonl
    features: Path | None = None  # image features, in the order of the table: .npz
    sheet: Path | None = None  # an HTML contact sheet
    overwrite: bool = False  # replace files that exist

    def check(self) -> None:
        """Raise ZooError for unknown suffixes, results that exist, and places that cannot be written."""
        formats = {"--output": [*writers.TABLES], "--features": [".npz"]}
        given = {"--output": self.table, "--features": self.features, "--sheet": self.sheet}
        files = {option: file for option, file in given.items() if file}
        for option, file in files.items():
            if file.suffix not in (known := formats.get(option, [file.suffix])):
                raise ZooError(f"{option} {file}: its suffix must be {' or '.join(known)}.")
            if [*files.values()].count(file) > 1:
                raise ZooError(f"{file} is named twice: choose another file for one of the outputs.")
            check_output(file, self.overwrite or self._has_begun(file), option)

    def _has_begun(self, file: Path) -> bool:
        """Whether an earlier run, which this one resumes, has written a file."""
        plan = self.table.with_name(self.table.name + UNFINISHED) / PLAN
        return file.exists() and plan.exists() and file.stat().st_mtime >= plan.stat().st_mtime


def run(
    images: Sequence[str],
    load: Callable[[], Predictor],
    job: Job,
    outputs: OutputFiles,
    plan: Values,
    *,
    progress: Progress = no_progress,
    part_seconds: float = 20,
) -> Summary:
    """Classify images and write the outputs, which are checked first. Stopped in any way, the same call resumes: rows
    are kept every `part_seconds`. ZooError for an output that exists, is not writable or belongs to another run.

    Args:
        load: called only if an image is left to classify.
        plan: plain JSON, such as the head's hash: only a run with the same plan continues this one.
    """
    outputs.check()
    digest = sha256("\n".join(images).encode("utf-8", "surrogateescape")).hexdigest()
    plan |= {"top_k": job.top_k, "together": job.together, "images": digest, "features": outputs.features is not None}
    with unfinished_run(outputs.table, plan) as rows:
        resumed = rows.done
        predictor = load() if resumed < len(images) or job.together else None
        if predictor and resumed < len(images):
            computed = job.classify(images[resumed:], predictor)
            batches = progress(computed, "images", len(images), done=resumed, size=lambda batch: len(batch.rows))
            rows.keep(batches, part_seconds)
        answers = rows.rows
        kept = rows.features() if job.together or outputs.features else None
        if predictor and job.together and kept is not None:
            refined = job.refined([*answers()], kept, predictor.classnames, progress)
            answers, kept = lambda: iter(refined), kept[:, : -len(predictor.classnames)]
        if outputs.features and kept is not None:
            rows.write(outputs.features, lambda temporary: writers.write_features(temporary, images, kept))
        if outputs.sheet:
            rows.write(outputs.sheet, partial(writers.write_sheet, outputs.sheet, images, answers()))
        write_table = writers.TABLES[outputs.table.suffix]  # the last: it says that the run is complete
        rows.write(outputs.table, lambda temporary: write_table(temporary, answers(), writers.columns(answers())))
        failed = [row["error"] for row in answers() if "error" in row]
        changed = tuple(row for row in answers() if is_changed(row)) if job.together else ()
    rows.remove()
    return Summary(len(images), resumed, len(failed), changed, failed[:NAMED])


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
        self.done = self.classified = sum(1 for _ in self.rows())

    @property
    def later(self) -> str:
        """Advice after an error."""
        kept = f"of {self.classified:,} images that were classified, the rows of {self.done:,} are kept"
        return f"run the same command again later: {kept}"

    def keep(self, batches: Iterable[Rows], seconds: float) -> None:
        """Write parts at an interval, and what is left at the end or when the run is stopped."""
        rows, features, written = list[Row](), list[np.ndarray](), time.monotonic()
        try:
            for batch in batches:
                rows += batch.rows
                self.classified += len(batch.rows)
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
