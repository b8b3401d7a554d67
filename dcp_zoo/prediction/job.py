"""Classify many images into files, with resume.

Until the files are complete, OUTPUT.partial.sqlite holds what the run depends on, and each image's answer
with the state of its file: the same command continues from there.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.answers import Outputs, Row
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra
from dcp_zoo.fields import Values
from dcp_zoo.files import check_output, file_state, locked, write_file
from dcp_zoo.prediction import Predictor
from dcp_zoo.prediction import outputs as writers
from dcp_zoo.prediction.together import refined
from dcp_zoo.progress import Progress, by_image, no_progress
from dcp_zoo.tables import NONE

LATER = "run the same command again later: it continues"


def classified(
    images: Sequence[str], predictor: Predictor, together: bool = False, progress: Progress = no_progress
) -> list[Row]:
    """The rows of all images, refined if they are to be."""
    with closing(sqlite3.connect(":memory:")) as database:
        answers = _Answers(database, images)
        answers.compute(predictor, progress)
        return list(refine(answers, predictor) if together else answers)


def classify(images: Sequence[str], predictor: Predictor) -> Iterator[tuple[list[Row], Outputs]]:
    """Rows and outputs of images in order, batch by batch."""
    backend = predictor.backend
    remaining = iter(images)
    promises = predictor.promises
    for errors, outputs in backend.batches(images, predictor.batch_size):
        rows = []
        answers = outputs.rows(backend.classnames, predictor.top_k, promises)
        for error, image, answer in zip(errors, islice(remaining, len(errors)), answers, strict=True):
            rows.append({"image": image} | (answer if error is None else {"error": str(error)}))
        yield rows, outputs


def refine(alone: "_Answers", predictor: Predictor) -> list[Row]:
    """The rows with the answers that `refined` gives; "alone" is the class that each image had without the
    others. Rejected and unreadable images stay as they are and influence no other."""
    rows = [row if "error" in row else row | {"alone": row["class"]} for row in alone]
    accepted = np.array([row.get("alone", NONE) != NONE for row in rows], bool)
    probabilities = refined(Outputs(alone.kept("logits"), features=alone.kept("features")), accepted)
    answers = Outputs(np.log(probabilities.clip(min=1e-30))).rows(predictor.backend.classnames, predictor.top_k)
    for row, answer, is_accepted in zip(rows, answers, accepted, strict=True):
        if is_accepted:
            row |= answer
        row.pop("trusted", None)  # the answers of images alone are
    return rows


def errors_of(rows: Iterable[Row]) -> list[str]:
    """Why images cannot be read."""
    return [row["error"] for row in rows if "error" in row]


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
        begun = self.partial(".sqlite")
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
            was_stopped = file.exists() and begun.exists() and file.stat().st_mtime >= begun.stat().st_mtime
            check_output(file, self.overwrite or was_stopped, option)


def run(
    images: Sequence[str],
    predictor: Predictor,
    outputs: OutputFiles,
    together: bool = False,
    progress: Progress = no_progress,
) -> list[str]:
    """Classify images and write the outputs, which are checked first. Stopped in any way, the same call
    continues: it computes the images that are new, were replaced since or could not be read, and loads the
    head only if there are any. Returns why images cannot be read. ZooError for an output that
    exists, is not writable or belongs to another run."""
    outputs.check()
    plan = predictor.depends_on() | {
        "top_k": predictor.top_k,
        "together": together,
        "features": outputs.features is not None,
    }
    file = outputs.partial(".sqlite")
    taken = f"Another process is writing {file}: wait for it, or choose another --output."
    with locked(outputs.partial(".lock"), taken):  # the system releases it with the process
        # the database needs no locks of its own, which not every file system has
        connection = f"{file.absolute().as_uri()}?nolock=1"
        with (
            as_zoo_error(f"Cannot write to {file}: {{}}. {LATER.capitalize()}.", sqlite3.Error),
            closing(sqlite3.connect(connection, uri=True)) as database,
        ):
            answers = _Answers(database, images)
            differ = answers.begin(plan)
            if differ:
                problem = f"{file} holds the first answers of another run, which differs in {', '.join(differ)}."
                raise ZooError(f"{problem} Repeat that run's command, choose another --output, or delete this file.")
            answers.compute(predictor, progress)
            rows = refine(answers, predictor) if together else answers
            _write(rows, answers, outputs)
            errors = errors_of(rows)
        file.unlink()
    return errors


def _write(rows: Iterable[Row], answers: "_Answers", outputs: OutputFiles) -> None:
    """Write the outputs of a run whose answers are complete."""
    if outputs.features:
        features = answers.kept("features")
        write_file(outputs.features, partial(writers.write_features, names=answers.images, features=features), LATER)
    if outputs.sheet:
        write_file(outputs.sheet, partial(writers.write_sheet, outputs.sheet, rows), LATER)
    write_file(outputs.table, partial(writers.TABLES[outputs.table.suffix], rows=rows), LATER)


class _Answers(Iterable[Row]):
    """The answers for some images in the database of a run that has not ended, read anew each time: they need
    no memory. It has the row of each image, the state of its file then, and its features and logits, of a
    predictor that keeps features."""

    def __init__(self, database: sqlite3.Connection, images: Sequence[str]) -> None:
        self.database = database
        self.images = images
        database.execute("CREATE TABLE IF NOT EXISTS answers (image BLOB PRIMARY KEY, state, row, features, logits)")

    def get(self, column: str, image: str) -> Any:
        """None of an image without an answer."""
        query = f"SELECT {column} FROM answers WHERE image = ?"
        found = self.database.execute(query, [os.fsencode(image)]).fetchone()
        return found and found[0]

    def put(
        self,
        image: str,
        row: Values,
        state: str | None = None,
        features: np.ndarray | None = None,
        logits: np.ndarray | None = None,
    ) -> None:
        values = os.fsencode(image), state, json.dumps(row), features, logits
        self.database.execute("REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", values)

    def begin(self, plan: Values) -> list[str]:
        """In what the run differs from that of the answers that are there."""
        before = self.get("row", "")  # no image has this name
        if before is None:
            self.put("", plan)
            return []
        known = json.loads(before)
        return [name.replace("_", " ") for name in plan if known.get(name) != plan[name]]

    def compute(self, predictor: Predictor, progress: Progress) -> None:
        """Add the answers for images that have none, of the files as they are now."""
        images = self.images
        states = {image: json.dumps(file_state(image)) for image in images}  # before any is read
        remaining = [image for image in images if self.get("state", image) != states[image]]
        if not remaining:
            return
        batches = classify(remaining, predictor)
        for rows, outputs in by_image(progress, batches, "images", len(images), len(images) - len(remaining)):
            with self.database:  # all of them or none, also after a power cut
                for i, row in enumerate(rows):
                    # what could not be read may be by now, such as with the plugin for HEIC
                    state = None if "error" in row else states[row["image"]]
                    kept = [] if outputs.features is None else [outputs.features[i], outputs.logits[i]]
                    self.put(row["image"], row, state, *kept)

    def __iter__(self) -> Iterator[Row]:
        for image in self.images:
            yield json.loads(self.get("row", image))

    def kept(self, column: str) -> np.ndarray:
        """Features or logits (n, F), of the images in order."""
        width = len(self.get(column, self.images[0])) // 4
        kept = np.empty((len(self.images), width), np.float32)
        for row, image in enumerate(self.images):
            kept[row] = np.frombuffer(self.get(column, image), np.float32)
        return kept
