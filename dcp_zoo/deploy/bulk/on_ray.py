"""Many images on a Ray cluster, with Ray Data: parts of the images in, parts of the table out.

OUTPUT/_plan.json          what is computed: another command may not continue it
OUTPUT/part-00000.parquet  the rows of one part: a shard, or up to 1,000 other images

What a part holds follows from the plan, and it appears complete or not at all. So a part that exists is done, and one
that is computed twice, after a worker died, is the same.
"""

import json
import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from dcp_zoo.cluster import check_fits, connect, enter, slots
from dcp_zoo.data.find import Found, find_images
from dcp_zoo.data.remote import filesystem, is_url
from dcp_zoo.data.shards import shard_files
from dcp_zoo.data.table import SHARD_SCHEME
from dcp_zoo.deploy.bulk.classifier import Classifier
from dcp_zoo.deploy.bulk.outputs import TABLES, column_names
from dcp_zoo.deploy.bulk.parts import check_same_plan
from dcp_zoo.deploy.bulk.rows import Row, classify
from dcp_zoo.deploy.bulk.run import Summary
from dcp_zoo.errors import ZooError, cannot_write, import_extra
from dcp_zoo.files import write_atomically

PART_IMAGES = 1000
PLAN = "_plan.json"  # readers of a folder of Parquet files skip names with an underscore
ATTEMPTS = 3  # at a part whose worker dies

Part = str | list[Found]  # a shard wds://FILE, whose images only the worker lists; or images


@dataclass(frozen=True)
class Job:
    """What every actor needs: the classifier, and the options of `classify`. `folder` is where paths start."""

    load: Callable[[], Classifier]
    output: str
    top_k: int
    batch_size: int
    workers: int
    reject: bool
    folder: str


def run_on_ray(
    sources: Sequence[str],
    load: Callable[[], Classifier],
    output: str,
    plan: dict[str, Any],
    *,
    address: str,
    cpus: int = 1,
    gpus: float | None = None,
    top_k: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    reject: bool = False,
    progress: Callable[[Iterator[Any], int, int], Iterator[Any]] = lambda results, total, done: results,
    part_images: int = PART_IMAGES,
) -> Summary:
    """Classify images on a cluster; repeated, the same call computes only the parts that do not exist yet.

    Args:
        sources: see `find_images`; files must be at URLs or on a disk that all machines share.
        load: returns the classifier, once per actor.
        output: a folder for the parts, which all machines share, or a URL.
        plan: see `dcp_zoo.deploy.bulk.run.run`.
        address: see `dcp_zoo.cluster.connect`.
        cpus: cores per actor.
        gpus: GPUs per actor. None: 1 if the cluster has any.
        top_k, batch_size, workers, reject: see `classify`; `workers` are per actor.
        progress: wraps the results of the parts, given the number of all and of those done before.
        part_images: images per part.

    Raises:
        ZooError: no cluster, an output that is not writable or belongs to another run, or a part that no worker
            finishes. Finished parts are kept.
    """
    import_extra("pyarrow", "ray")
    output = output if is_url(output) else os.path.abspath(output)  # noqa: PTH100
    parts = dict(enumerate(split_into_parts(sources, part_images)))
    digest = sha256(repr(list(parts.values())).encode("utf-8", "surrogateescape")).hexdigest()
    done = _begin(output, plan | {"top_k": top_k, "reject": reject, "images": digest})
    todo = {number: part for number, part in parts.items() if name(number) not in done}
    images, failed = _count(output, [name(number) for number in parts.keys() - todo.keys()])
    summary = Summary(images, images, failed)
    if todo:
        ray, started_here = connect(address)
        try:
            gpus = float("GPU" in ray.cluster_resources()) if gpus is None else gpus
            check_fits(ray, cpus, gpus, "one actor", "--threads")
            job = Job(load, output, top_k, batch_size, workers, reject, os.getcwd())  # noqa: PTH109
            for images, failed in progress(_results(ray, todo, job, cpus, gpus), len(parts), len(parts) - len(todo)):
                summary = Summary(summary.images + images, summary.resumed, summary.failed + failed)
        finally:
            if started_here:
                ray.shutdown()
    if missing := {name(number) for number in parts} - _names(output):
        raise ZooError(
            f"Workers have written {', '.join(sorted(missing)[:3])}, but not into this machine's {output}. --output "
            "must be a folder that all machines of the cluster share, or a URL."
        )
    return summary


def split_into_parts(sources: Sequence[str], size: int) -> Iterator[Part]:
    """The parts of the sources, in order: each shard, and the other images in groups of up to `size`."""
    for shards, group in groupby(sources, lambda source: source.startswith(SHARD_SCHEME)):
        if shards:
            yield from (f"{SHARD_SCHEME}{file}" for source in group for file in shard_files(source))
        else:
            images = find_images(list(group))
            yield from (images[start : start + size] for start in range(0, len(images), size))


def name(number: int) -> str:
    """The file of a part."""
    return f"part-{number:05}.parquet"


# ---------------------------------------------------------------------------------------------------- the output folder


def _begin(output: str, plan: dict[str, Any]) -> set[str]:
    """Store the plan, or check that it is the one of the parts that exist; their names."""
    found = _names(output)
    if PLAN in found:
        system, folder = filesystem(output)
        check_same_plan(output, json.loads(system.cat_file(f"{folder}/{PLAN}")), plan)
    elif found:
        raise ZooError(f"{output} holds other files: choose a new folder for --output.")
    else:
        _write(output, PLAN, json.dumps(plan, indent=1).encode())
    return found


def _names(output: str) -> set[str]:
    """The names in the output folder, without the hidden ones, which a kill may leave."""
    system, folder = filesystem(output)
    system.invalidate_cache()
    try:
        names = {path.rpartition("/")[2] for path in system.ls(folder, detail=False)}
    except FileNotFoundError:
        return set()
    except Exception as error:  # every file system has exceptions of its own
        raise ZooError(f"Cannot list {output}: {error}.") from error
    return {name for name in names if name and not name.startswith(".")}


def _write(output: str, file: str, content: bytes) -> None:
    """Write a file of the output folder, so that others see all of it or nothing."""
    system, folder = filesystem(output)
    try:
        if "file" in system.protocol:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(folder, file), lambda temporary: Path(temporary).write_bytes(content))
        else:
            system.pipe_file(f"{folder}/{file}", content)  # object stores show complete objects only
    except Exception as error:
        raise cannot_write(f"{output}/{file}", error) from error


def _count(output: str, files: Sequence[str]) -> tuple[int, int]:
    """The images in finished parts, and how many of them cannot be read."""
    system, folder = filesystem(output)
    read = partial(import_extra("pyarrow.parquet", "ray").read_table, columns=["error"], filesystem=system)
    columns = [read(f"{folder}/{file}").column(0) for file in files]
    return sum(map(len, columns)), sum(len(column) - column.null_count for column in columns)


# ---------------------------------------------------------------------------------------------------------- the cluster


def _results(ray: Any, parts: dict[int, Part], job: Job, cpus: int, gpus: float) -> Iterator[tuple[int, int]]:
    """For each part, in the order in which they are finished: its images, and how many of them cannot be read."""
    data = import_extra("ray.data", "ray")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    rows = [{"number": number, "part": pickle.dumps(part)} for number, part in parts.items()]  # names may not be UTF-8
    results = data.from_items(rows, override_num_blocks=len(rows)).map(
        Actor,
        fn_constructor_args=(job, ray.remote(num_cpus=0)(Attempts).remote()),
        compute=data.ActorPoolStrategy(size=min(len(rows), slots(ray, cpus, gpus))),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    try:
        for row in results.iter_rows():
            if row["problem"]:
                raise ZooError(row["problem"])
            yield row["images"], row["failed"]
    except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError) as error:
        raise ZooError(f"Ray lost the run ({error}). Finished parts are kept: run the same command again.") from error


class Attempts:
    """Counts how often each part was begun, in a process of its own: Ray Data alone would repeat a part for ever."""

    def __init__(self) -> None:
        self.counts = Counter[int]()

    def begin(self, number: int) -> int:
        self.counts[number] += 1
        return self.counts[number]


class Actor:
    """Classifies and writes one part per call, in a process of the cluster. `attempts`: the handle of `Attempts`."""

    def __init__(self, job: Job, attempts: Any) -> None:
        self.job, self.attempts = job, attempts
        self.classifier: Classifier | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A number and its part -> counts; or a problem that would end every part."""
        number, part = row["number"], pickle.loads(row["part"])
        try:
            self.begin(number, part)
            rows = self.classify(part)
            self.write(name(number), rows)
        except ZooError as error:  # Ray would wrap it
            return {"images": 0, "failed": 0, "problem": str(error)}
        return {"images": len(rows), "failed": sum("error" in row for row in rows), "problem": ""}

    def begin(self, number: int, part: Part) -> None:
        import ray

        if ray.get(self.attempts.begin.remote(number)) > ATTEMPTS:
            place = part if isinstance(part, str) else f"the images from {part[0].name} on"
            raise ZooError(
                f"{ATTEMPTS} workers died at {place}, perhaps for lack of memory. Finished parts are kept: run the "
                "same command again, with a smaller --batch-size, or more --threads for fewer workers per machine."
            )

    def classify(self, part: Part) -> list[Row]:
        job = self.job
        if self.classifier is None:
            enter(job.folder)
            self.classifier = job.load()
        images = find_images([part]) if isinstance(part, str) else part
        batches = classify(images, self.classifier, job.top_k, job.batch_size, job.workers, job.reject)
        rows = [row for batch in batches for row in batch.rows]
        if all("error" in row for row in rows) and not any("://" in i.path or Path(i.path).exists() for i in images):
            raise ZooError(
                f"A worker finds none of {len(images)} images, such as {images[0].path}: they must be at URLs, or on a "
                "disk that all machines of the cluster share."
            )
        return rows

    def write(self, file: str, rows: list[Row]) -> None:
        assert self.classifier
        columns = column_names(min(self.job.top_k, len(self.classifier.classnames)), self.job.reject)
        TABLES[".parquet"](content := BytesIO(), rows, columns)
        _write(self.job.output, file, content.getvalue())
