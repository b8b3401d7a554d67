"""Classify many images into files, with resume.

Until the files are complete, OUTPUT.partial.jsonl holds what the run depends on and then a row per image,
with the state of its file, and OUTPUT.partial.float32 the features of these rows: the same command
continues from there. Images that are new, were replaced meanwhile or could not be read get a row behind the
others.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.answers import Outputs, Row, is_changed, top_classes
from dcp_zoo.errors import ZooError, import_extra, writing_to
from dcp_zoo.fields import Values
from dcp_zoo.files import check_output, file_state, locked, write_file
from dcp_zoo.prediction import Predictor
from dcp_zoo.prediction import outputs as writers
from dcp_zoo.prediction.together import refined
from dcp_zoo.progress import Progress, by_image, no_progress
from dcp_zoo.tables import NONE

# in a row of a run that has not ended
STATE = "state"  # of the image's file
WIDTH = "width"  # of its features
LATER = "run the same command again later: it continues"
Summary = tuple[list[str], int]  # see `summary_of`
Batch = tuple[list[Row], np.ndarray | None]  # rows, and their features (n, E) or, with `together`, (n, E + C)


def classify(images: Sequence[str], predictor: Predictor, together: bool = False) -> Iterator[Batch]:
    """Classify images in order, batch by batch; with `together` by a predictor that keeps features."""
    backend = predictor.backend
    remaining = iter(images)
    promises = predictor.promises
    for errors, outputs in backend.batches(images, predictor.batch_size):
        rows = []
        answers = outputs.rows(backend.classnames, predictor.top_k, promises)
        for error, image, answer in zip(errors, remaining, answers, strict=False):
            rows.append({"image": image} | (answer if error is None else {"error": str(error)}))
        kept = outputs.features
        if together and kept is not None:
            kept = np.concatenate([kept, outputs.logits], 1)
        yield rows, kept


def refine(rows: Iterable[Row], kept: np.ndarray, predictor: Predictor) -> list[Row]:
    """The rows with the answers that `refined` gives, from what `classify` kept of them; "alone" is the
    class that each image had without the others. Rejected and unreadable images stay as they are and
    influence no other."""
    classnames = predictor.backend.classnames
    features, logits = np.split(kept, [-len(classnames)], axis=1)
    rows = [row if "error" in row else row | {"alone": row["class"]} for row in rows]
    accepted = np.array([row.get("alone", NONE) != NONE for row in rows], bool)
    probabilities = refined(Outputs(logits, features=features), accepted)
    ranked = top_classes(probabilities, classnames, predictor.top_k)
    for row, predictions, is_accepted in zip(rows, ranked, accepted, strict=True):
        if is_accepted:
            row["class"] = predictions[0]["class"]
            row["predictions"] = predictions
        row.pop("trusted", None)  # the answers of images alone are
    return rows


def classified(
    images: Sequence[str], predictor: Predictor, together: bool = False, progress: Progress = no_progress
) -> list[Row]:
    """The rows of all images, refined if they are to be."""
    batches = by_image(progress, classify(images, predictor, together), "images", len(images))
    parts, kept = zip(*batches, strict=True)
    rows = list(chain(*parts))
    return refine(rows, np.concatenate(kept), predictor) if together else rows


def summary_of(rows: Iterable[Row]) -> Summary:
    """Why images cannot be read, and how many answers `together` changed."""
    errors = []
    changed = 0
    for row in rows:
        changed += is_changed(row)
        if "error" in row:
            errors.append(row["error"])
    return errors, changed


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
        rows = self.partial(".jsonl")
        for option, file, suffixes in (
            ("--output", self.table, [*writers.TABLES]),
            ("--features", self.features, [".npz"]),
            ("--sheet", self.sheet, []),
        ):
            if file is None:
                continue
            if suffixes and file.suffix not in suffixes:
                raise ZooError(f"{option} {file}: its suffix must be {' or '.join(suffixes)}.")
            # a run that was stopped at its end has written some of them
            was_stopped = file.exists() and rows.exists() and file.stat().st_mtime >= rows.stat().st_mtime
            check_output(file, self.overwrite or was_stopped, option)


def run(
    images: Sequence[str],
    predictor: Predictor,
    outputs: OutputFiles,
    together: bool = False,
    progress: Progress = no_progress,
) -> Summary:
    """Classify images and write the outputs, which are checked first. Stopped in any way, the same call
    continues: it computes the images that are new, were replaced since or could not be read, and loads the
    head only if there are any. Returns what `summary_of` does of its rows. ZooError for an output that
    exists, is not writable or belongs to another run."""
    outputs.check()
    plan = predictor.depends_on() | {
        "top_k": predictor.top_k,
        "together": together,
        "features": outputs.features is not None,
    }
    with locked(outputs.partial(".lock")) as free:  # the system releases it with the process
        if not free:
            raise ZooError(
                f"Another process is writing {outputs.partial('.jsonl')}: wait for it, or choose another --output."
            )
        _compute(images, predictor, outputs, plan, progress)
        summary = _finish(images, predictor, outputs, together)
        for suffix in (".jsonl", ".float32"):
            outputs.partial(suffix).unlink(missing_ok=True)
    return summary


def _compute(
    images: Sequence[str], predictor: Predictor, outputs: OutputFiles, plan: Values, progress: Progress
) -> None:
    """Append the rows and features of the images that the files of an earlier run lack."""
    file = outputs.partial(".jsonl")
    rows = _begun(file, plan, images)
    states = {image: file_state(image) for image in images}  # before any is read
    remaining = [image for image in images if states[image] is None or states[image] != rows.states.get(image)]
    if not remaining:
        return
    done = len(rows.starts)
    end = rows.end
    batches = classify(remaining, predictor, plan["together"])
    for batch, kept in by_image(progress, batches, "images", len(images), len(images) - len(remaining)):
        width = 0
        if kept is not None:
            width = kept.shape[1]
            _put(kept.tobytes(), outputs.partial(".float32"), done * kept[0].nbytes)
        stored = [row | {STATE: states[row["image"]], WIDTH: width} for row in batch]
        lines = "".join(json.dumps(row) + "\n" for row in stored).encode()
        _put(lines, file, end)
        done += len(batch)
        end += len(lines)


class _Rows(Iterable[Row]):
    """The rows of some images in the file of a run that has not ended, read anew each time: they need no
    memory.

    Attributes:
        plan: what the run depends on; None if the file does not say it whole.
        starts, end: where each row in the file begins, and where the last one ends.
        numbers, states: of each image its last row, counted from 0, and the `file_state` that it was
            computed of.
        width: numbers in a row of features.
    """

    def __init__(self, file: Path, images: Sequence[str]) -> None:
        self.file = file
        self.images = images
        self.starts: list[int] = []
        self.width = 0
        self.numbers: dict[str, int] = {}
        self.states: Values = {}
        with file.open("rb") as lines:
            first = lines.readline()
            self.plan = json.loads(first) if first.endswith(b"\n") else None
            self.end = len(first)
            for line in lines:
                if not line.endswith(b"\n"):  # the run was killed while it was written
                    break
                row = json.loads(line)
                self.numbers[row["image"]] = len(self.starts)
                # what could not be read may be by now, such as with the plugin for HEIC
                self.states[row["image"]] = None if "error" in row else row.get(STATE)
                self.width = row.get(WIDTH, 0)
                self.starts.append(self.end)
                self.end += len(line)

    def __iter__(self) -> Iterator[Row]:
        with self.file.open("rb") as lines:
            for image in self.images:
                lines.seek(self.starts[self.numbers[image]])
                row = json.loads(lines.readline())
                yield {name: value for name, value in row.items() if name not in (STATE, WIDTH)}

    def features(self, file: Path) -> np.ndarray:
        """Those in this file (n, F), of the same images."""
        order = [self.numbers[image] for image in self.images]
        shape = len(self.starts), self.width
        features = np.memmap(file, np.float32, "r", shape=shape)
        return features if order == [*range(len(self.starts))] else features[order]


def _begun(file: Path, plan: Values, images: Sequence[str]) -> _Rows:
    """The rows that an earlier run left in a file, which gets the plan if new; ZooError for another plan."""
    before = _Rows(file, images) if file.exists() else None
    if before is None or before.plan is None:
        _put(json.dumps(plan).encode() + b"\n", file, 0)
        return _Rows(file, images)
    differ = [name.replace("_", " ") for name in plan if before.plan.get(name) != plan[name]]
    if differ:
        problem = f"{file} holds the first rows of another run, which differs in {', '.join(differ)}."
        raise ZooError(f"{problem} Repeat that run's command, choose another --output, or delete this file.")
    return before


def _put(content: bytes, file: Path, position: int) -> None:
    """Let a file end with this content, which begins at this position, also after a power cut."""
    with writing_to(file, LATER), file.open("r+b" if file.exists() else "wb") as opened:
        opened.seek(position)
        opened.write(content)
        opened.truncate()
        opened.flush()
        os.fsync(opened.fileno())


def _finish(images: Sequence[str], predictor: Predictor, outputs: OutputFiles, together: bool) -> Summary:
    """Write the outputs of a run whose rows are complete."""
    rows: Any = _Rows(outputs.partial(".jsonl"), images)
    kept: Any = rows.features(outputs.partial(".float32")) if together or outputs.features else None
    if together:
        rows = refine(rows, kept, predictor)
        kept = kept[:, : -len(predictor.backend.classnames)]
    if outputs.features:
        write_file(outputs.features, partial(writers.write_features, names=images, features=kept), LATER)
    if outputs.sheet:
        write_file(outputs.sheet, partial(writers.write_sheet, outputs.sheet, images, rows), LATER)
    write_file(outputs.table, partial(writers.TABLES[outputs.table.suffix], rows=rows), LATER)
    return summary_of(rows)
