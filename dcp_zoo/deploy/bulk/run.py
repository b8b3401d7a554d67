"""From many images to files: a run that resumes where a killed one stopped."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dcp_zoo.data.find import Found
from dcp_zoo.deploy.bulk.job import Job, Shows, Summary, unshown
from dcp_zoo.deploy.bulk.outputs import FEATURES, TABLES, as_unicode, check_suffix, columns
from dcp_zoo.deploy.bulk.rows import Rows
from dcp_zoo.deploy.bulk.sort import check_sortable, sort_into
from dcp_zoo.deploy.bulk.unfinished import UNFINISHED, UnfinishedRun, unfinished_run
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import try_writing

PART_SECONDS = 20.0  # of work that a kill may lose


@dataclass(frozen=True)
class Outputs:
    """What a run writes.

    Attributes:
        table: predictions: .csv, .jsonl or .parquet.
        features: image features, in the order of the table: .npz or .parquet.
        sheet: an HTML contact sheet.
        sort_into: a folder that gets a folder of images per class; symbolic links if `link`.
    """

    table: Path
    features: Path | None = None
    sheet: Path | None = None
    sort_into: Path | None = None
    link: bool = False

    def check(self, images: Sequence[Found]) -> None:
        """Raise ZooError for unknown suffixes, results that exist, and places that cannot be written."""
        check_suffix(self.table, TABLES, "--output")
        if self.features:
            check_suffix(self.features, FEATURES, "--features")
        if self.sort_into:
            check_sortable(images, self.sort_into)
        files = list(filter(None, (self.table, self.features, self.sheet)))
        for file in files:
            if file.exists() and not self.table.with_name(self.table.name + UNFINISHED).exists():
                raise ZooError(f"{file} exists already: delete it, or choose another file.")
            if files.count(file) > 1:
                raise ZooError(f"{file} is named twice: choose another file for one of the outputs.")
        for folder in {file.parent for file in files} | ({self.sort_into} if self.sort_into else set()):
            try:
                try_writing(folder)
                if folder is not self.sort_into:
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(folder, error) from error


def run(
    images: Sequence[Found],
    job: Job,
    outputs: Outputs,
    *,
    progress: Shows = unshown,
    part_seconds: float = PART_SECONDS,
) -> Summary:
    """Classify images and write the outputs. Stopped in any way, even by a kill, the same call resumes.

    Args:
        images: see `find_images`.
        job: what is computed.
        outputs: the files; checked before anything is computed.
        progress: shows the batches.
        part_seconds: finished rows are kept at this interval.

    Raises:
        ZooError: an output that exists, is not writable or belongs to another run. Finished rows are kept.
    """
    outputs.check(images)
    plan = job.plan_of((image.name for image in images), features=outputs.features is not None)
    with unfinished_run(outputs.table, plan) as rows:
        resumed = rows.done
        if resumed < len(images):
            batches = job.classify(images[resumed:], job.load())
            shown = progress(batches, "images", len(images), done=resumed, size=lambda batch: len(batch.rows))
            _keep(rows, shown, part_seconds)
        failed = _finish(rows, images, outputs)
    rows.remove()
    return Summary(len(images), resumed, failed)


def _keep(rows: UnfinishedRun, batches: Iterator[Rows], seconds: float) -> None:
    """Keep rows at an interval, and what is left at the end or when the run is stopped."""
    waiting: list[Rows] = []
    written = time.monotonic()
    try:
        for batch in batches:
            waiting.append(batch)
            if time.monotonic() - written >= seconds:
                rows.add(waiting)
                waiting, written = [], time.monotonic()
    finally:
        if waiting:
            rows.add(waiting)


def _finish(rows: UnfinishedRun, images: Sequence[Found], outputs: Outputs) -> int:
    """Write the outputs; the table comes last, for it says that the run is complete. Returns the number of images that
    cannot be read."""
    if outputs.features:
        names = [as_unicode(image.name) for image in images]
        write = FEATURES[outputs.features.suffix]
        rows.write(outputs.features, lambda temporary: write(temporary, names, rows.features()))
    if outputs.sheet:
        from dcp_zoo.deploy.bulk.sheet import write_sheet

        rows.write(outputs.sheet, partial(write_sheet, outputs.sheet, images, rows.rows()))
    if outputs.sort_into:
        sort_into(images, rows.rows(), outputs.sort_into, outputs.link)
    write_table = TABLES[outputs.table.suffix]
    rows.write(outputs.table, lambda temporary: write_table(temporary, rows.rows(), columns(rows.rows())))
    return sum("error" in row for row in rows.rows())
