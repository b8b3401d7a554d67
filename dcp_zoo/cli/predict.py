"""`dcp-zoo predict`."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dcp_zoo.cli.console import errors, log, output, print_error, progress_bar
from dcp_zoo.cli.options import (
    Classes,
    Descriptions,
    Device,
    Head,
    Precision,
    Ray,
    Stats,
    Threads,
    class_list,
    head_name,
)
from dcp_zoo.cli.threads import available_cores, use_threads
from dcp_zoo.data.class_file import read_descriptions
from dcp_zoo.data.find import Found, find_images
from dcp_zoo.data.remote import is_url
from dcp_zoo.data.samples import SAMPLE_CLASSES, sample_images
from dcp_zoo.errors import ZooError, check_choice

if TYPE_CHECKING:
    from dcp_zoo.deploy.bulk.classifier import Classifier
    from dcp_zoo.deploy.bulk.rows import Row, Rows

DEFAULT_HEAD = "dcp_mini.caltech101-16shot"
RUNTIMES = ("torch", "onnx")
FEW = 8  # images with a table each, and without a progress bar
MANY = 1000  # images whose results belong in a file
MINIATURE_NOTE = "dcp_mini is a miniature for trying things out: expect mistakes that CLIP itself would not make."
FILES = "Files"


def to_file(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=FILES)


def predict(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image files, folders, patterns in quotes, a .txt file with one path per line, wds://PATH, "
            "hf://datasets/ORG/NAME or .parquet files; also at URLs such as s3://BUCKET/FOLDER."
        ),
    ] = None,
    head: Head = DEFAULT_HEAD,
    classes: Classes = None,
    descriptions: Descriptions = None,
    top_k: Annotated[int, typer.Option(min=1, help="Predictions per image.")] = 5,
    sample: Annotated[bool, typer.Option("--sample", help="Classify the six photographs of the package.")] = False,
    reject: Annotated[
        bool,
        typer.Option("--reject", help="Answer `none of these` for images of other things; see dcp-zoo fit-classifier."),
    ] = False,
    stats: Stats = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails/--no-thumbnails", help="Show up to eight images, in a terminal with colours.")
    ] = True,
    table: Annotated[
        str | None,
        to_file(
            "Write the predictions to a .csv, .jsonl or .parquet file; with --ray, to a folder or URL. After a kill, "
            "the same command resumes.",
            "--output",
        ),
    ] = None,
    features: Annotated[Path | None, to_file("Keep the image features in a .npz or .parquet file.")] = None,
    sheet: Annotated[
        Path | None, to_file("Write an HTML contact sheet: the images of each class, the least certain first.")
    ] = None,
    sort_into: Annotated[Path | None, to_file("Copy the images into this folder, in one folder per class.")] = None,
    link: Annotated[bool, to_file("With --sort-into: make symbolic links instead of copies.", "--link")] = False,
    runtime: Annotated[
        str,
        typer.Option(help="torch or onnx (ONNX Runtime, starts faster; exports the head once)."),
    ] = "torch",
    onnx: Annotated[
        Path | None, typer.Option(help="A file from `dcp-zoo export`, run with ONNX Runtime instead of --head.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch; it does not affect the predictions.")] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that decode images; 0 decodes in the main process. Default: one per core for more than "
            "two batches.",
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    threads: Threads = None,
    ray: Ray = None,
) -> None:
    """Classify images. The exit code is 1 if one cannot be read.

    [dim]dcp-zoo predict --sample[/]
    [dim]dcp-zoo predict cat.jpg dog.jpg --classes "cat,dog,tea cup"[/]
    [dim]dcp-zoo predict PHOTOS --head my_head --output predictions.csv[/]
    [dim]dcp-zoo predict PHOTOS --head my_head --sort-into SORTED --sheet sheet.html[/]
    [dim]dcp-zoo predict s3://bucket/photos --output s3://bucket/predictions --ray auto[/]
    """
    check_choice("runtime", runtime, RUNTIMES)
    if link and not sort_into:
        raise ZooError("--link belongs to --sort-into FOLDER.")
    files = [file for file in (table and Path(table), features, sheet, sort_into) if file]
    if files and as_json:
        raise ZooError("--json prints to the screen: for a file use --output predictions.jsonl.")
    sources = [*(images or []), *(sample_images() if sample else [])]
    if not sources:
        raise ZooError("Pass images, a folder of images, or --sample for six photographs.")
    if ray:
        check_cluster_options(table, features or sheet or sort_into)
        threads = threads or 1
    elif table and is_url(table):
        raise ZooError(f"Without --ray, --output is a file on this machine, not {table}.")
    found = [] if ray else find_images(sources)
    names = class_list(classes)
    if sample and not images and not onnx and head == DEFAULT_HEAD:
        names = names or SAMPLE_CLASSES
    if onnx or runtime == "onnx":
        if stats or descriptions or precision != "float32" or device not in ("auto", "cpu") or (onnx and classes):
            others = "--stats, --descriptions, --device and --precision" + (", and --classes" if onnx else "")
            raise ZooError(f"ONNX Runtime runs an exported file as it is, on the CPU: omit {others}.")
        load, plan = onnx_head(onnx, head, names, threads, features is not None)
    else:
        sentences = read_descriptions(descriptions) if descriptions else None
        load, plan = torch_head(head, names, sentences, stats, device, precision, threads, features is not None)
    options: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size, "reject": reject}
    if ray:
        gpus = 0 if runtime == "onnx" or onnx or device == "cpu" else None if device == "auto" else 1
        predict_on_ray(
            sources, load, str(table), plan(), address=ray, cpus=threads, gpus=gpus, workers=workers or 0, **options
        )
        return
    if workers is None:
        workers = available_cores() if len(found) > 2 * batch_size else 0
    options["workers"] = workers
    if not files:
        if len(found) > MANY and not as_json:
            raise ZooError(f"{len(found):,} images are too many for the screen: pass --output predictions.csv.")
        failed = show_all(found, load(), as_json, options, thumbnails)
    else:
        from dcp_zoo.deploy.bulk.run import Outputs, run

        path = Path(table) if table else default_table(files[0], sort_into)
        outputs = Outputs(path, features, sheet, sort_into, link)
        failed = run(found, load, outputs, plan(), progress=show_progress, **options).failed
        log_summary(len(found), failed, path)
    if failed:
        raise typer.Exit(1)


def check_cluster_options(table: str | None, other: Path | None) -> None:
    """ZooError for a missing Ray, and for outputs that a cluster does not write."""
    from dcp_zoo.cluster import import_ray

    import_ray()
    if not table or other:
        raise ZooError("--ray writes a folder of Parquet files: pass --output FOLDER or a URL, and no other output.")


def predict_on_ray(sources: Sequence[str], load: "Load", output: str, plan: dict[str, Any], **options: Any) -> None:
    """Classify images on a cluster; exits with 1 if one cannot be read."""
    from dcp_zoo.deploy.bulk.on_ray import run_on_ray

    def progress(results: Iterator[Any], total: int, done: int) -> Iterator[Any]:
        if done:
            log(f"Resuming after {done:,} of {total:,} parts.")
        return progress_bar(results, "parts", total, done=done)

    summary = run_on_ray(sources, load, output, plan, progress=progress, **options)
    log_summary(summary.images, summary.failed, output)
    if summary.failed:
        raise typer.Exit(1)


def log_summary(images: int, failed: int, place: object) -> None:
    log(f"{images:,} image{'s' * (images != 1)}{f', of which {failed:,} cannot be read' if failed else ''}: {place}")


def default_table(file: Path, sort_into: Path | None) -> Path:
    """The table of a run without --output: in the folder of sorted images, or named after the other file."""
    return sort_into / "predictions.csv" if sort_into else file.with_suffix(".csv")


Load = Callable[[], "Classifier"]
Plan = Callable[[], dict[str, Any]]  # what the predictions depend on


def onnx_head(
    file: Path | None, head: str, classes: list[str] | None, threads: int | None, features: bool
) -> tuple[Load, Plan]:
    """An exported file or a head for ONNX Runtime."""
    from dcp_zoo.deploy.bulk.classifier import onnx_classifier
    from dcp_zoo.deploy.onnx_cache import onnx_file
    from dcp_zoo.files import sha256_of

    # called on every machine of a cluster, which has a cache of its own
    find = partial(Path, file) if file else partial(onnx_file, head_name(head), classes, log)
    if not find().is_file():
        raise ZooError(f"There is no file {file}: create one with dcp-zoo export.")
    threads = threads or available_cores()
    return lambda: onnx_classifier(find(), threads, features), lambda: {"runtime": "onnx", "file": sha256_of(find())}


def torch_head(
    head: str,
    classes: list[str] | None,
    descriptions: dict[str, list[str]] | None,
    stats: str | None,
    device: str,
    precision: str,
    threads: int | None,
    features: bool,
) -> tuple[Load, Plan]:
    """A head for PyTorch."""
    from dcp_zoo.deploy.bulk.classifier import torch_classifier
    from dcp_zoo.zoo.locate import head_folder, head_sha256

    name = head_name(head)

    def load() -> "Classifier":
        from dcp_zoo.training.device import pick_device
        from dcp_zoo.zoo.factory import create_model

        use_threads(threads)
        texts: dict[str, Any] = {"classnames": classes, "descriptions": descriptions}
        model = create_model(name, True, **texts, stats=stats).eval().to(pick_device(device))
        return torch_classifier(model, features, precision)

    def plan() -> dict[str, Any]:
        digest = head_sha256(head_folder(name))
        texts = {"classes": classes} | ({"descriptions": descriptions} if descriptions else {})
        return {"runtime": "torch", "head": digest, **texts, "stats": stats, "precision": precision}

    return load, plan


# -------------------------------------------------------------------------------------------------------------- screen


def show_progress(batches: "Iterator[Rows]", total: int, done: int) -> "Iterator[Rows]":
    if done:
        log(f"Resuming after {done:,} of {total:,} images.")
    return progress_bar(batches, "images", total, done=done, size=lambda batch: len(batch.rows))


def show_all(
    found: Sequence[Found], classifier: "Classifier", as_json: bool, options: dict[str, Any], thumbnails: bool = True
) -> int:
    """Print the predictions of all images; returns how many cannot be read."""
    from dcp_zoo.deploy.bulk.rows import classify

    batches = classify(found, classifier, **options)
    if len(found) > FEW:
        batches = progress_bar(batches, "images", len(found), transient=True, size=lambda batch: len(batch.rows))
    rows = [row for batch in batches for row in batch.rows]
    failed = [row["error"] for row in rows if "error" in row]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif len(rows) - len(failed) > FEW:
        output.print(summary_table(rows))
    else:
        show_each([(image, row) for image, row in zip(found, rows, strict=True) if "predictions" in row], thumbnails)
    for error in failed:
        print_error(error)
    if failed and len(rows) > 1:
        log(f"{len(failed)} of {len(rows)} images cannot be read.")
    if classifier.architecture == "dcp_mini" and not as_json:
        errors.print(MINIATURE_NOTE, style="dim", highlight=False)
    return len(failed)


def show_each(answers: "Sequence[tuple[Found, Row]]", thumbnails: bool) -> None:
    """Print a table for each image, and beside it the image if the terminal shows it."""
    from dcp_zoo.cli.thumbnails import beside_pictures

    tables: Sequence[Table] = [predictions_table(row) for _, row in answers]
    if thumbnails:
        tables = beside_pictures(tables, (image.path for image, _ in answers))
    output.print(*tables, sep="")


def predictions_table(row: "Row") -> Table:
    """The classes of one image, one per line."""
    title = Path(row["image"]).name + (": none of these" if row.get("rejected") else "")
    table = Table("class", "probability", title=escape(title), title_justify="left")
    for prediction in row["predictions"]:
        bar = "█" * round(20 * prediction["probability"])
        table.add_row(escape(prediction["class"]), f"{100 * prediction['probability']:5.1f} %  {bar}")
    return table


def summary_table(rows: "Sequence[Row]") -> Table:
    """The best class of every image, one image per line."""
    from dcp_zoo.deploy.bulk.rows import label

    table = Table("image", "class", "probability", caption="All classes: --json, or --output predictions.csv")
    for row in rows:
        if "predictions" in row:
            probability = row["predictions"][0]["probability"]
            table.add_row(escape(row["image"]), escape(label(row)), f"{100 * probability:5.1f} %")
    return table
