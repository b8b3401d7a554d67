"""`dcp-zoo predict`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.table import Table
from typer import Argument, Exit

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import advise, log, output, plain_table, print_error, progress_bar
from dcp_zoo.data.find import Found, find_images
from dcp_zoo.data.load import read_answers
from dcp_zoo.data.packaged import SAMPLE_CLASSES, sample_images
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.files import printable, sha256_of
from dcp_zoo.heads.config import read_config, rejection_note
from dcp_zoo.threads import available_cores, use_threads
from dcp_zoo.training.recipes import AUTO
from dcp_zoo.zoo.registry import DEFAULT_HEAD, MINIATURE_NOTE
from dcp_zoo.zoo.resolve import head_folder, head_sha256

if TYPE_CHECKING:
    from dcp_zoo.answers import Row
    from dcp_zoo.prediction.job import Job, Summary
    from dcp_zoo.prediction.predictor import Predictor

BATCH = 32  # images at a time
FEW = 8  # images with a table each, and without a progress bar
EXAMPLES = 3  # of answers that other images changed
ON_SCREEN = 1000  # images whose results belong in a file
to_file = partial(opt.option, None, rich_help_panel="Files")
IMAGES = "Images, folders, patterns in quotes, or a .txt file with one path per line."
LABELS = (
    "A .csv or .xlsx file with the columns file and class, such as corrections of predictions. What it "
    "says of an image, a class or `none of these`, is its answer. May be repeated: the last one counts."
)


@dataclass(frozen=True)
class PredictOptions:
    images: Annotated[list[str] | None, Argument(help=IMAGES)] = None
    head: opt.HeadName = DEFAULT_HEAD
    classes: opt.Classes = None
    top_k: int = opt.option(5, "Predictions per image.", min=1)
    sample: bool = opt.option(False, "Classify six sample photographs.")
    reject: bool = opt.option(False, "Label images of other things `none of these`.")
    labels: list[Path] | None = opt.option(None, LABELS, metavar="FILE")
    together: bool = opt.option(False, "Refine predictions with the other images, if these are of few classes.")
    as_json: opt.AsJson = False
    table: Path | None = to_file("Write a .csv or .jsonl file.", "--output")
    features: Path | None = to_file("Write the image features to a .npz file.")
    sheet: Path | None = to_file("Write a page to look at: the images of each class, the least certain first.")
    overwrite: bool = opt.option(False, "Replace existing files.", rich_help_panel="Files")
    device: opt.Device = "auto"
    precision: opt.Precision = AUTO

    @property
    def files(self) -> list[Path]:
        """The table first if it is named."""
        return [file for file in (self.table, self.features, self.sheet) if file]

    @property
    def on_onnx(self) -> bool:
        return self.head.endswith(".onnx")

    @property
    def classnames(self) -> list[str] | None:
        """The names in place of the head's, if any: of the sample, unless to reject, which needs the head's own."""
        only_sample = self.sample and not (self.images or self.reject) and self.head == DEFAULT_HEAD
        return opt.class_list(self.classes) or (SAMPLE_CLASSES if only_sample else None)

    def check(self) -> None:
        """Raise ZooError for options that do not fit together."""
        names = ("classes", "precision")  # what an export has decided
        fixed = [f"--{name}" for name in names if getattr(self, name) not in (None, AUTO, "float32")]
        problems = {
            "Pass images, a folder of images, or --sample for six photographs.": not (self.images or self.sample),
            "--json prints to the screen: for a file use --output predictions.jsonl.": self.files and self.as_json,
            f"{self.head} is run as it was exported: omit {', '.join(fixed)}, or pass the head itself.": self.on_onnx
            and fixed,
        }
        if found := [problem for problem, holds in problems.items() if holds]:
            raise ZooError(found[0])


@opt.takes_options
def predict(options: PredictOptions) -> None:
    """Classify images. The exit code is 1 if one cannot be read.

    --head may also be an .onnx file from dcp-zoo export: it runs with ONNX Runtime and without PyTorch.

    [dim]dcp-zoo predict --sample[/]
    [dim]dcp-zoo predict cat.jpg dog.jpg --classes "cat,dog,tea cup"[/]
    [dim]dcp-zoo predict PHOTOS --head my_head --output predictions.csv[/]
    [dim]dcp-zoo predict PHOTOS --head my_head --reject --output predictions.csv --sheet sheet.html[/]
    """
    options.check()
    sources = [*(options.images or []), *(sample_images() if options.sample else [])]
    if options.reject and not (options.on_onnx or options.as_json or options.classnames):
        config = read_config(head_folder(opt.head_name(options.head)))
        if note := rejection_note(config["dcp"], options.reject):
            log(note)
    if options.files:
        done, place = write_files(sources, options)
        failed = done.failed
        for error in done.errors:
            print_error(printable(error))
        parts = [f"{done.labelled:,} labelled by --labels"] if done.labelled else []
        parts += [f"{failed:,} cannot be read"] if failed else []
        bad = f", of which {' and '.join(parts)}" if parts else ""
        log(f"{done.images:,} image{'s' * (done.images != 1)}{bad}: {place}")
        say_together(done.changed, done.images, options)
    else:
        failed = show_on_screen(find_images(sources), options)
    if failed:
        raise Exit(1)


def job_of(options: PredictOptions, images: Sequence[Found] = ()) -> "Job":
    """The head, run by PyTorch or ONNX Runtime. `images`: those to classify, if they are known."""
    from dcp_zoo.prediction.job import Job

    load, plan = onnx_head(options) if options.on_onnx else torch_head(options, len(images))
    answers = read_answers(options.labels, [image.name for image in images], options.images or ())
    return Job(load, plan, options.top_k, BATCH, options.reject, options.together, answers)


LoadedFrom = tuple[Callable[[], "Predictor"], Values]  # what loads it, and what the predictions depend on


def onnx_head(options: PredictOptions) -> LoadedFrom:
    from dcp_zoo.onnx.classifier import onnx_predictor

    file, features = Path(options.head), options.together or options.features is not None
    if not file.is_file():
        raise ZooError(f"There is no file {file}: create one with dcp-zoo export.")
    plan = {"runtime": "onnx", "file": sha256_of(file)}
    return lambda: onnx_predictor(file, available_cores(), features, options.device), plan


def torch_head(options: PredictOptions, images: int = 0) -> LoadedFrom:
    name = opt.head_name(options.head)
    from dcp_zoo.prediction.heads import torch_predictor
    from dcp_zoo.training.device import pick_device, pick_precision

    precision = options.precision
    if precision == AUTO:  # part of the plan: a run is only continued in the same one
        architecture = read_config(head_folder(name))["architecture"]
        precision = pick_precision(AUTO, architecture, pick_device(options.device))

    def load() -> "Predictor":
        from dcp_zoo.zoo.factory import create_model

        use_threads()
        model = create_model(name, True, classnames=options.classnames).eval().to(pick_device(options.device))
        features = options.together or options.features is not None
        return torch_predictor(model, features, precision, options.reject, images or None)

    plan = {"runtime": "torch", "head": head_sha256(head_folder(name)), "classnames": options.classnames}
    return load, plan | {"precision": precision}


def write_files(sources: Sequence[str], options: PredictOptions) -> "tuple[Summary, Path]":
    """The counts, and the table's file."""
    from dcp_zoo.prediction.on_disk import OutputFiles, run

    table = options.table or options.files[0].with_suffix(".csv")  # without --output named after the other file
    outputs = OutputFiles(table, options.features, options.sheet, options.overwrite)
    found = find_images(sources)
    outputs.check()  # before PyTorch is imported
    return run(found, job_of(options, found), outputs, progress=progress_bar), table


def show_on_screen(found: Sequence[Found], options: PredictOptions) -> int:
    """Print the predictions of all images; returns how many cannot be read."""
    if len(found) > ON_SCREEN and not options.as_json:
        raise ZooError(f"{len(found):,} images are too many for the screen: pass --output predictions.csv.")
    from dcp_zoo.answers import is_changed, label, written

    job = job_of(options, found)
    predictor = job.load()
    batches = job.classify(found, predictor)
    if len(found) > FEW:
        batches = progress_bar(batches, "images", len(found), transient=True, size=lambda batch: len(batch.rows))
    rows = job.collect(batches, predictor.classnames)
    failed = [row["error"] for row in rows if "error" in row]
    if options.as_json:
        print(json.dumps([*map(written, rows)], indent=1))
    elif len(rows) - len(failed) > FEW:
        read = [row for row in rows if "predictions" in row]
        sure = ("" if row.get("rejected") else certainty(row["predictions"][0]) for row in read)
        cells = [(row["image"], label(row), probability) for row, probability in zip(read, sure, strict=True)]
        output.print(plain_table(("image", "class", "probability"), cells))
        output.print("All classes: --json, or --output predictions.csv", style="dim")
    else:
        output.print(*(predictions_table(row) for row in rows if "predictions" in row), sep="")
    for error in failed:
        print_error(printable(error))
    if failed and len(rows) > 1:
        log(f"{len(failed)} of {len(rows)} images cannot be read.")
    say_together([row for row in rows if is_changed(row)], len(rows), options)
    if predictor.architecture == "dcp_mini" and not options.as_json:
        advise(MINIATURE_NOTE)
    return len(failed)


def say_together(changed: "Sequence[Row]", images: int, options: PredictOptions) -> None:
    """Say how many predictions the other images changed, with examples."""
    if not options.together:
        return
    from dcp_zoo.answers import label

    examples = [f"{row['image']} is {label(row)}, alone {row['alone']}" for row in changed[:EXAMPLES]]
    if examples:
        such = f"such as {'; '.join(examples)}"
        log(printable(f"The other images changed {len(changed):,} of {images:,} predictions, {such}."))
    else:
        log("The other images changed nothing: they can only where a folder holds few of the head's classes.")


def predictions_table(row: "Row") -> Table:
    title = Path(row["image"]).name + (": none of these" if row.get("rejected") else "")
    table = Table("class", "probability", title=escape(printable(title)), title_justify="left")
    for prediction in row["predictions"]:
        bar = "█" * round(20 * (prediction["probability"] or 0))
        table.add_row(escape(printable(prediction["class"])), f"{certainty(prediction)}  {bar}")
    return table


def certainty(prediction: Values) -> str:
    """The probability of a class, or that a person said it."""
    return "labelled" if prediction["probability"] is None else f"{100 * prediction['probability']:5.1f} %"
