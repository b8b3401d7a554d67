"""From many images to files on this machine, by way of parts in the folder OUTPUT.unfinished, from which a run resumes:
FOLDER/_plan.json says what is computed, FOLDER/part-* have the rows. A part that exists is complete; what a kill leaves
half-written is hidden."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, count
from pathlib import Path

import numpy as np

from dcp_zoo.answers import Row, is_changed, label
from dcp_zoo.data.find import Found
from dcp_zoo.data.images import days_of
from dcp_zoo.data.keywords import keyword_files, with_keywords
from dcp_zoo.data.paths import check_output, companions
from dcp_zoo.data.progress import Progress, no_progress
from dcp_zoo.deploy.bulk import outputs as writers
from dcp_zoo.deploy.bulk.job import NAMED, Job, Rows, Summary
from dcp_zoo.deploy.bulk.journal import Journal
from dcp_zoo.deploy.bulk.sorted_folders import check_sortable, move_into, replaced_since, sort_into
from dcp_zoo.deploy.together import Count
from dcp_zoo.errors import ZooError, as_zoo_error, warn, writing_to
from dcp_zoo.fields import Values
from dcp_zoo.files import LOCK, UNFINISHED, Content, check_writable, locked, write_file
from dcp_zoo.texts import class_folders, read_csv

PLAN = "_plan.json"


@dataclass(frozen=True)
class OutputFiles:
    table: Path  # predictions: .csv or .jsonl
    features: Path | None = None  # image features, in the order of the table: .npz
    sheet: Path | None = None  # an HTML contact sheet
    sort_into: Path | None = None  # a folder that gets a folder of images per class
    move: bool = False  # the images themselves instead of copies
    by_date: bool = False  # in each class a folder per day
    only_new: bool = False  # leave out images that the table has, and add the others to it
    keywords: float | None = None  # write the classes as keywords, up to this share of wrong ones
    embed: bool = False  # in JPEGs themselves, not beside them
    overwrite: bool = False  # replace files that exist

    def check_stopped(self) -> None:
        """Raise ZooError after a run that was stopped while it moved the images, which says how to undo it."""
        if self.move and self.undo_file.exists():
            advice = f"dcp-zoo undo {self.undo_file}, and then repeat the command"
            raise ZooError(f"A run was stopped while it moved these images: {advice}.")

    def check(self, images: Sequence[Found]) -> None:
        """Raise ZooError as of `check_stopped`, and for unknown suffixes, results that exist, and places that cannot be
        written."""
        self.check_stopped()
        if self.sort_into:
            check_sortable(images, self.sort_into)
        for image in images if self.move or (self.keywords and not self.sort_into) else ():
            if image.path != image.name or os.path.islink(image.path):  # noqa: PTH114
                where = f"{image.name} is a link, or in an archive"
                raise ZooError(f"{where}: only files themselves can be moved or get keywords. Pass these.")
        for folder in {os.path.dirname(image.path) for image in images if self.move}:  # noqa: PTH120
            check_writable(Path(folder), "omit --move, to copy the images")
        formats = {"--output": [*writers.TABLES], "--features": [".npz"]}
        given = {"--output": self.table, "--features": self.features, "--sheet": self.sheet}
        files = {option: file for option, file in given.items() if file}
        for option, file in files.items():
            if file.suffix not in (known := formats.get(option, [file.suffix])):
                raise ZooError(f"{option} {file}: its suffix must be {' or '.join(known)}.")
            if [*files.values()].count(file) > 1:
                raise ZooError(f"{file} is named twice: choose another file for one of the outputs.")
            adds = self.only_new and file == self.table
            check_output(file, self.overwrite or adds or self._has_begun(file), option)
        if self.sort_into:
            check_writable(self.sort_into)

    def earlier(self, images: Sequence[Found]) -> list[Values]:
        """The rows of the table that `only_new` adds to, but those of images that could not be read, or that are others
        since: cameras give their names again. A warning counts these."""
        if not (self.only_new and self.table.exists()):
            return []
        written = self.table.stat().st_mtime
        files = {os.path.abspath(image.name): Path(image.path) for image in images}  # noqa: PTH100
        changed = {name for name, file in files.items() if file.exists() and file.stat().st_mtime > written}
        if self.sort_into and not self.move:
            changed |= replaced_since(self.sort_into, files)
        with as_zoo_error(f"Cannot read {self.table} ({{}}): --only-new adds to a .csv that predict wrote."):
            header, *rows = read_csv(self.table)
            cells = [dict(zip(header, row, strict=True)) for row in rows]
            known = [row for row in cells if not row["error"]]
            stay = [row for row in known if os.path.abspath(row["image"]) not in changed]  # noqa: PTH100
        if left := len(known) - len(stay):
            warn(f"Changed since {self.table}, and classified again: {left:,} images.")
        return stay

    @property
    def undo_file(self) -> Path:
        """Of the run that this one resumes, or a new one."""
        files = (self.table.with_suffix(f".undo{f'-{number}' * (number > 1)}.jsonl") for number in count(1))
        return next(file for file in files if not file.exists() or self._has_begun(file))

    def _has_begun(self, file: Path) -> bool:
        """Whether an earlier run, which this one resumes, has written a file."""
        plan = self.table.with_name(self.table.name + UNFINISHED) / PLAN
        return file.exists() and plan.exists() and file.stat().st_mtime >= plan.stat().st_mtime


def run(
    images: Sequence[Found],
    job: Job,
    outputs: OutputFiles,
    *,
    progress: Progress = no_progress,
    part_seconds: float = 20,
) -> Summary:
    """Classify images and write the outputs, which are checked first. Stopped in any way, the same call resumes: rows
    are kept every `part_seconds`. ZooError for an output that exists, is not writable or belongs to another run."""
    outputs.check(images)
    earlier = outputs.earlier(images)
    classified = {os.path.abspath(row["image"]) for row in earlier}  # noqa: PTH100
    images = [image for image in images if os.path.abspath(image.name) not in classified]  # noqa: PTH100
    plan = job.plan_of((image.name for image in images), features=outputs.features is not None)
    with unfinished_run(outputs.table, plan) as rows:
        resumed = rows.done
        predictor = job.load() if resumed < len(images) or job.together or outputs.sheet else None
        if predictor and resumed < len(images):
            computed = job.classify(images[resumed:], predictor)
            batches = progress(computed, "images", len(images), done=resumed, size=lambda batch: len(batch.rows))
            rows.keep(batches, part_seconds)
        answers, counts = rows.rows, list[Count]()
        kept = rows.features() if job.together or outputs.features else None
        if predictor and job.together and kept is not None:
            refined, counts = job.refined([*answers()], kept, predictor.classnames, progress)
            answers, kept = lambda: iter(refined), kept[:, : -len(predictor.classnames)]
        journal = Journal(outputs.undo_file) if outputs.move or outputs.keywords else None
        known = {os.path.splitext(os.path.abspath(row["image"]))[0] for row in earlier}  # noqa: PTH100, PTH122
        places = _sorted(images, answers(), outputs, journal, known)
        if outputs.move:
            images = [Found(str(to), str(to)) if to else image for image, to in zip(images, places, strict=True)]
            answers = partial(_renamed, answers, images)
        written = 0
        if outputs.keywords and journal:
            classes = (job.keywords(row, outputs.keywords) for row in answers())
            written = write_keywords(places, classes, outputs.embed, journal)
        if outputs.features and kept is not None:
            names = [image.name for image in images]
            rows.write(outputs.features, lambda temporary: writers.write_features(temporary, names, kept))
        if outputs.sheet and predictor:
            about = outputs.sheet, images, predictor.classnames, answers()
            keywords = {"embed": outputs.embed, "hierarchy": job.plan.get("hierarchy")} if outputs.keywords else None
            folder = outputs.sort_into and writers.relative(outputs.sort_into, outputs.sheet.parent)
            done = {"sorted": folder, "moved": outputs.move, "keywords": keywords}
            rows.write(outputs.sheet, partial(writers.write_sheet, *about, places=places, run=done))
        write_table = writers.TABLES[outputs.table.suffix]  # the last: it says that the run is complete
        columns = dict.fromkeys([*(name for row in earlier[:1] for name in row), *writers.columns(answers())])
        rows.write(outputs.table, lambda temporary: write_table(temporary, chain(earlier, answers()), [*columns]))
        failed = [row["error"] for row in answers() if "error" in row]
        changed = tuple(row for row in answers() if is_changed(row)) if job.together else ()
        labelled = sum(row.get("labelled", False) for row in answers()) if job.labels else 0
        classes_of = Counter(label(row) for row in answers() if "error" not in row)
    rows.remove()
    numbers = len(images), resumed, len(failed), changed, tuple(counts), labelled
    return Summary(*numbers, classes_of, written, journal.file if journal else None, failed[:NAMED])


def _sorted(
    images: Sequence[Found], answers: Iterable[Row], outputs: OutputFiles, journal: Journal | None, known: set[str]
) -> Sequence[Path | None]:
    """Where each image is, after they are sorted into folders if they are to be. Moved ones get none of the `known`
    names, those of the table, even if a person has moved these on."""
    if outputs.sort_into is None:
        return [Path(image.path) for image in images]
    classes = [None if "error" in row else label(row) for row in answers]
    folders = class_folders({name for name in classes if name is not None})
    named = [folders.get(name or "") for name in classes]
    if outputs.by_date:
        days = days_of([image.path if folder else "" for image, folder in zip(images, named, strict=True)])
        named = [folder and f"{folder}/{day}" for folder, day in zip(named, days, strict=True)]
    paths = [image.path for image in images]
    if journal and outputs.move:
        return move_into(paths, named, outputs.sort_into, journal, known)
    names = [os.path.abspath(image.name) for image in images]  # noqa: PTH100
    return sort_into(paths, named, outputs.sort_into, names)


def _renamed(answers: Callable[[], Iterator[Row]], images: Sequence[Found]) -> Iterator[Row]:
    for row, image in zip(answers(), images, strict=True):
        yield row | {"image": image.name}


def write_keywords(
    places: Iterable[Path | None], classes: Iterable[list[str] | None], embed: bool, journal: Journal
) -> int:
    """Write the class of each image into its files of keywords; returns into how many. A warning counts those that
    cannot be read."""
    belonging, written, problems = cache(companions), 0, list[str]()
    for image, path in zip(places, classes, strict=True):
        if image is None or path is None:
            continue
        for file in keyword_files(image, belonging(image.parent).get(image.name, ()), embed):
            try:
                content = with_keywords(file, path, image)
            except ZooError as error:
                problems.append(str(error))
                continue
            if content is not None:
                journal.write(file, content)
                written += 1
    if problems:
        warn(f"Files without the new keywords: {len(problems):,}. {problems[0]}")
    return written


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
        kept = f"{self.done:,} finished rows are kept" if self.done else "the finished rows could not be kept"
        return f"run the same command again later: {kept}"

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
