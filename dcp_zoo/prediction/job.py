"""A run on many images: what it computes of each, and its way to files. Until these are whole, OUTPUT.partial.jsonl has
what the run depends on and then a row per image, and OUTPUT.partial.float32 their features: the same run continues."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.answers import Outputs, Row, is_changed, label, top_classes
from dcp_zoo.data.images import Progress, by_image, no_progress
from dcp_zoo.errors import ZooError, import_extra, writing_to
from dcp_zoo.fields import Values
from dcp_zoo.files import check_output, locked, write_file
from dcp_zoo.prediction import Predictor
from dcp_zoo.prediction import outputs as writers
from dcp_zoo.prediction.together import refined
from dcp_zoo.tables import NONE

LATER = "run the same command again later: it continues"
Told = tuple[list[str], int]  # see `told`
Batch = tuple[list[Row], np.ndarray | None]  # rows, and their features (n, E) or, with `together`, (n, E + C)


def classify(images: Sequence[str], predictor: Predictor, together: bool = False) -> Iterator[Batch]:
    """Classify images in order, batch by batch; with `together` by a predictor that keeps features."""
    left, backend = iter(images), predictor.backend
    for errors, outputs in backend.batches(images, predictor.batch_size):
        answers = zip(errors, left, outputs.rows(backend.classnames, predictor.top_k), strict=False)
        rows = [{"image": image} | ({"error": str(error)} if error else row) for error, image, row in answers]
        kept = outputs.features
        yield rows, np.concatenate([kept, outputs.logits], 1) if together and kept is not None else kept


def refine(rows: Iterable[Row], kept: np.ndarray, predictor: Predictor, progress: Progress = no_progress) -> list[Row]:
    """The rows with the answers that `refined` gives, from what `classify` kept of them; "alone" is the class that each
    image had without the others. Rejected and unreadable images stay as they are and influence no other."""
    classnames = predictor.backend.classnames
    rows = [row if "error" in row else row | {"alone": label(row)} for row in rows]
    named = np.array(["error" not in row and label(row) != NONE for row in rows], bool)
    features, logits = np.split(kept, [-len(classnames)], axis=1)
    probabilities = refined(Outputs(logits, features=features), named, progress)
    ranked = top_classes(probabilities, classnames, predictor.top_k)
    return [row | {"predictions": best} if mine else row for row, best, mine in zip(rows, ranked, named, strict=True)]


def classified(
    images: Sequence[str], predictor: Predictor, together: bool = False, progress: Progress = no_progress
) -> list[Row]:
    """The rows of all images, refined if they are to be."""
    rows, kept = zip(*by_image(progress, classify(images, predictor, together), "images", len(images)), strict=True)
    every = [*chain(*rows)]
    return refine(every, np.concatenate(kept), predictor) if together else every


def told(rows: Iterable[Row]) -> Told:
    """Why images cannot be read, and how many answers `together` changed."""
    return [row["error"] for row in rows if "error" in row], sum(map(is_changed, rows))


@dataclass(frozen=True)
class OutputFiles:
    table: Path  # predictions: .csv, .jsonl or .parquet
    features: Path | None = None  # image features, in the order of the table: .npz
    sheet: Path | None = None  # an HTML contact sheet
    overwrite: bool = False  # replace files that exist

    def partial(self, suffix: str) -> Path:
        """A file of a run that has not ended."""
        return self.table.with_name(f"{self.table.name}.partial{suffix}")

    def check(self) -> None:
        """Raise ZooError for unknown suffixes, results that exist, and places that cannot be written."""
        if self.table.suffix == ".parquet":
            import_extra("pyarrow", "data")
        formats = {"--output": [*writers.TABLES], "--features": [".npz"]}
        given = {"--output": self.table, "--features": self.features, "--sheet": self.sheet}
        files, rows = {option: file for option, file in given.items() if file}, self.partial(".jsonl")
        for option, file in files.items():
            if file.suffix not in (known := formats.get(option, [file.suffix])):
                raise ZooError(f"{option} {file}: its suffix must be {' or '.join(known)}.")
            # a run that was stopped at its end has written some of them
            was_stopped = file.exists() and rows.exists() and file.stat().st_mtime >= rows.stat().st_mtime
            check_output(file, self.overwrite or was_stopped, option)


def run(
    images: Sequence[str],
    predictor: Predictor,
    outputs: OutputFiles,
    together: bool = False,
    progress: Progress = no_progress,
) -> Told:
    """Classify images and write the outputs, which are checked first. Stopped in any way, the same call continues; the
    head is loaded only if an image is left. Returns what `told` does of its rows. ZooError for an output that exists,
    is not writable or belongs to another run."""
    outputs.check()
    digest = sha256("\n".join(images).encode("utf-8", "surrogateescape")).hexdigest()
    plan = predictor.depends_on() | {"top_k": predictor.top_k, "together": together, "images": digest}
    plan |= {"features": outputs.features is not None}
    file, features = outputs.partial(".jsonl"), outputs.partial(".float32")
    with locked(outputs.partial(".lock")) as free:  # the system releases it with the process
        if not free:
            raise ZooError(f"Another process is writing {file}: wait for it, or choose another --output.")
        done, end = _begun(file, plan)
        if done < len(images):
            batches = classify(images[done:], predictor, together)
            for rows, kept in by_image(progress, batches, "images", len(images), done):
                if kept is not None:
                    _put(kept.tobytes(), features, done * kept[0].nbytes)
                lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
                _put(lines, file, end)
                done, end = done + len(rows), end + len(lines)
        summary = _finish(images, predictor, outputs, together, progress)
        for old in (file, features):
            old.unlink(missing_ok=True)
    return summary


def _begun(file: Path, plan: Values) -> tuple[int, int]:
    """The number of rows that an earlier run left in a file, and where they end; ZooError for those of another plan."""
    if file.exists():
        with file.open("rb") as lines:
            first, rows = lines.readline(), [len(line) for line in lines if line.endswith(b"\n")]
        before = json.loads(first) if rows else plan
        if differ := [name.replace("_", " ") for name in plan if before.get(name) != plan[name]]:
            problem = f"{file} holds the first rows of another run, which differs in {', '.join(differ)}."
            raise ZooError(f"{problem} Repeat that run's command, choose another --output, or delete this file.")
        if rows:
            return len(rows), len(first) + sum(rows)
    first = json.dumps(plan).encode() + b"\n"
    _put(first, file, 0)
    return 0, len(first)


def _put(content: bytes, file: Path, position: int) -> None:
    """Let a file end with this content, which begins at this position, also after a power cut."""
    with writing_to(file, LATER), file.open("r+b" if file.exists() else "wb") as opened:
        opened.seek(position)
        opened.write(content)
        opened.truncate()
        opened.flush()
        os.fsync(opened.fileno())


class _Rows(Iterable[Row]):
    """The rows in a file, read anew each time: they need no memory."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __iter__(self) -> Iterator[Row]:
        with self.file.open("rb") as lines:
            next(lines)
            yield from map(json.loads, lines)


def _finish(
    images: Sequence[str], predictor: Predictor, outputs: OutputFiles, together: bool, progress: Progress
) -> Told:
    """Write the outputs of a run whose rows are complete."""
    rows: Iterable[Row] = _Rows(outputs.partial(".jsonl"))
    kept: Any = None
    if together or outputs.features:
        kept = np.memmap(outputs.partial(".float32"), np.float32, "r").reshape(len(images), -1)
    if together:
        rows = refine(rows, kept, predictor, progress)
        kept = kept[:, : -len(predictor.backend.classnames)]
    if outputs.features:
        write_file(outputs.features, partial(writers.write_features, names=images, features=kept), LATER)
    if outputs.sheet:
        write_file(outputs.sheet, partial(writers.write_sheet, outputs.sheet, images, rows), LATER)
    write_file(outputs.table, partial(writers.TABLES[outputs.table.suffix], rows=rows), LATER)
    return told(rows)
