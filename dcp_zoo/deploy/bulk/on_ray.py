"""Many images on a Ray cluster: OUTPUT/part-00000.parquet has the rows of a shard, or of up to 1,000 other images. What
a part holds follows from the plan, so that one that is computed twice, after a worker died, is the same."""

import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from dcp_zoo.cluster import LOCAL, ONE_CORE, Resources, run_tasks
from dcp_zoo.data.find import Found, find_images
from dcp_zoo.data.paths import filesystem, is_url
from dcp_zoo.data.progress import Progress, no_progress
from dcp_zoo.data.shards import find_shards
from dcp_zoo.data.specs import SHARD_SCHEME
from dcp_zoo.deploy.bulk.job import NAMED, Job, Predictor, Summary
from dcp_zoo.deploy.bulk.outputs import TABLES, column_names
from dcp_zoo.deploy.bulk.parts import PartFolder
from dcp_zoo.errors import ZooError, import_extra

PART_IMAGES = 1000


class Part(NamedTuple):
    """What one task classifies."""

    file: str  # in the output
    images: str | tuple[Found, ...]  # or a shard wds://FILE, whose images only the worker lists


def run_on_ray(
    sources: Sequence[str],
    job: Job,
    output: str,
    *,
    address: str = LOCAL,
    resources: Resources = ONE_CORE,
    progress: Progress = no_progress,
    part_images: int = PART_IMAGES,
) -> Summary:
    """Classify images on a cluster; repeated, the same call computes only the parts that do not exist yet. The sources,
    see `find_images`, and the output folder are at URLs or on a disk that all machines share. ZooError for no cluster,
    an output that is not writable or of another run, or a part that no worker finishes."""
    import_extra("pyarrow", "ray")
    folder = PartFolder(output if is_url(output) else os.path.abspath(output))  # noqa: PTH100
    parts = split_into_parts(sources, part_images)
    found = folder.begin(job.plan_of(repr(part.images) for part in parts))
    system, place = filesystem(folder.place)
    read = partial(import_extra("pyarrow.parquet", "ray").read_table, columns=["error"], filesystem=system)
    before = [read(f"{place}/{part.file}").column(0) for part in parts if part.file in found]
    images = resumed = sum(map(len, before))
    errors = [error for column in before for error in column.drop_null().to_pylist()]
    if todo := [part for part in parts if part.file not in found]:
        work = partial(classify_part, job=job, folder=folder, run=uuid4().hex)
        tasks = run_tasks(work, todo, resources, task="one worker", options="--threads", address=address)
        counts = {"done": len(parts) - len(todo), "size": lambda event: int(event.state == "done")}
        with closing(tasks):
            for event in progress(tasks, "parts", len(parts), **counts):
                if event.state == "lost":
                    lost = event.item.images
                    what = lost if isinstance(lost, str) else f"the images from {lost[0].name} on"
                    advice = "Finished parts are kept: run the same command again, with a smaller --batch-size."
                    raise ZooError(f"No worker could finish {what} ({event.message}), for lack of memory? {advice}")
                if event.state == "done":
                    images, errors = images + event.result[0], errors + event.result[1]
    if missing := {part.file for part in parts} - folder.names():
        problem = f"Workers have written {', '.join(sorted(missing)[:3])}, but not into this machine's {folder.place}."
        raise ZooError(f"{problem} --output must be a folder that all machines share, or a URL.")
    return Summary(images, resumed, len(errors), errors=errors[:NAMED])


def split_into_parts(sources: Sequence[str], size: int) -> list[Part]:
    """The parts of the sources, in order: each shard, and the other images in groups of up to `size`."""
    parts: list[str | tuple[Found, ...]] = []
    for shards, group in groupby(sources, lambda source: source.startswith(SHARD_SCHEME)):
        if shards:
            parts += [f"{SHARD_SCHEME}{file}" for source in group for file in find_shards(source)]
        else:
            images = tuple(find_images(list(group)))
            parts += [images[at : at + size] for at in range(0, len(images), size)]
    return [Part(f"part-{number:05}.parquet", images) for number, images in enumerate(parts)]


_loaded: dict[str, Predictor] = {}  # by run; a worker serves one run at a time


def classify_part(part: Part, job: Job, folder: PartFolder, run: str) -> tuple[int, list[str]]:
    """Classify and write one part; returns the number of its images, and why some of them cannot be read."""
    if run not in _loaded:
        _loaded.clear()
        _loaded[run] = job.load()
    predictor = _loaded[run]
    images = find_images([part.images]) if isinstance(part.images, str) else part.images
    rows = [row for batch in job.classify(images, predictor) for row in batch.rows]
    errors = [row["error"] for row in rows if "error" in row]
    if len(errors) == len(rows) and not any("://" in image.path or Path(image.path).exists() for image in images):
        problem = f"A worker cannot find any of {len(images)} images, such as {images[0].path}"
        raise ZooError(f"{problem}: they must be at URLs or on a disk that all machines share.")
    columns = column_names(min(job.top_k, len(predictor.classnames)), job.reject)
    TABLES[".parquet"](content := BytesIO(), rows, columns)
    folder.write(part.file, content.getvalue())
    return len(rows), errors
