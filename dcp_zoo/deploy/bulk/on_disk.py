"""From many images to files on this machine, by way of parts in the folder OUTPUT.unfinished: see `UnfinishedRun`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dcp_zoo.answers import is_changed, label
from dcp_zoo.data.find import Found
from dcp_zoo.data.paths import check_output
from dcp_zoo.data.progress import Progress, no_progress
from dcp_zoo.deploy.bulk import outputs as writers
from dcp_zoo.deploy.bulk.job import NAMED, Job, Summary
from dcp_zoo.deploy.bulk.parts import PLAN, unfinished_run
from dcp_zoo.deploy.bulk.sorted_folders import check_sortable, is_file, sort_into
from dcp_zoo.deploy.together import Count
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.files import UNFINISHED, check_writable
from dcp_zoo.texts import class_folders


@dataclass(frozen=True)
class OutputFiles:
    table: Path  # predictions: .csv, .jsonl or .parquet
    features: Path | None = None  # image features, in the order of the table: .npz or .parquet
    sheet: Path | None = None  # an HTML contact sheet
    sort_into: Path | None = None  # a folder that gets a folder of images per class
    link: bool = False  # symbolic links instead of copies there
    overwrite: bool = False  # replace files that exist

    def check(self, images: Sequence[Found]) -> None:
        """Raise ZooError for unknown suffixes, results that exist, and places that cannot be written."""
        if self.sort_into:
            check_sortable(images, self.sort_into)
        formats = {"--output": writers.TABLES, "--features": writers.FEATURES}
        given = {"--output": self.table, "--features": self.features, "--sheet": self.sheet}
        files = {option: file for option, file in given.items() if file}
        for option, file in files.items():
            if file.suffix not in (known := formats.get(option, [file.suffix])):
                raise ZooError(f"{option} {file}: its suffix must be {' or '.join(known)}.")
            if file.suffix == ".parquet":
                import_extra("pyarrow", "data")
            if [*files.values()].count(file) > 1:
                raise ZooError(f"{file} is named twice: choose another file for one of the outputs.")
            check_output(file, self.overwrite or self._has_begun(file), option)
        if self.sort_into:
            check_writable(self.sort_into)

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
        if outputs.features:
            names = [writers.as_unicode(image.name) for image in images]
            write = writers.FEATURES[outputs.features.suffix]
            rows.write(outputs.features, lambda temporary: write(temporary, names, kept))
        if outputs.sheet and predictor:
            about = outputs.sheet, images, predictor.classnames, answers()
            rows.write(outputs.sheet, partial(writers.write_sheet, *about))
        if outputs.sort_into:
            folders = class_folders({label(row) for row in answers() if "error" not in row})
            places = (
                folders[label(row)] if "error" not in row and is_file(image) else None
                for image, row in zip(images, answers(), strict=True)
            )
            names = [os.path.abspath(image.name) for image in images]  # noqa: PTH100
            sort_into([image.path for image in images], places, outputs.sort_into, outputs.link, names)
        write_table = writers.TABLES[outputs.table.suffix]  # the last: it says that the run is complete
        rows.write(outputs.table, lambda temporary: write_table(temporary, answers(), writers.columns(answers())))
        failed = [row["error"] for row in answers() if "error" in row]
        changed = tuple(row for row in answers() if is_changed(row)) if job.together else ()
        labelled = sum(row.get("labelled", False) for row in answers()) if job.labels else 0
    rows.remove()
    return Summary(len(images), resumed, len(failed), changed, tuple(counts), labelled, failed[:NAMED])
