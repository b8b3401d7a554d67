"""`dcp-zoo predict`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.table import Table
from typer import Argument, Exit

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import advise, log, output, plain_table, print_error, progress_bar, rejection_note
from dcp_zoo.data.find import find_images
from dcp_zoo.data.packaged import SAMPLE_CLASSES, sample_images
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.files import printable, sha256_of
from dcp_zoo.heads.config import read_config
from dcp_zoo.threads import available_cores, use_threads
from dcp_zoo.training.recipes import AUTO
from dcp_zoo.zoo.registry import DEFAULT_HEAD, MINIATURE_NOTE
from dcp_zoo.zoo.resolve import head_folder, head_sha256

if TYPE_CHECKING:
    from dcp_zoo.answers import Row
    from dcp_zoo.prediction import Predictor
    from dcp_zoo.prediction.job import Summary

BATCH = 32  # images at a time
FEW = 8  # images with a table each, and without a progress bar
EXAMPLES = 3  # of answers that other images changed
ON_SCREEN = 1000  # images whose results belong in a file
to_file = partial(opt.option, None, rich_help_panel="Files")
IMAGES = "Images, folders, patterns in quotes, or a .txt file with one path per line."


@dataclass(frozen=True)
class PredictOptions:
    images: Annotated[list[str] | None, Argument(help=IMAGES)] = None
    head: opt.HeadName = DEFAULT_HEAD
    classes: opt.Classes = None
    top_k: int = opt.option(5, "Predictions per image.", min=1)
    sample: bool = opt.option(False, "Classify six sample photographs.")
    reject: bool = opt.option(False, "Label images of other things `none of these`.")
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
        """Those to write."""
        return [file for file in (self.table, self.features, self.sheet) if file]

    @property
    def place(self) -> Path:
        """The table's file: without --output named after the other file."""
        return self.table or self.files[0].with_suffix(".csv")

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
    images = find_images(sources)
    done = write_files(images, options) if options.files else show_on_screen(images, options)
    for error in done.errors:
        print_error(printable(error))
    if options.files:
        bad = f", of which {done.failed:,} cannot be read" if done.failed else ""
        log(f"{done.images:,} image{'s' * (done.images != 1)}{bad}: {options.place}")
    elif done.failed and done.images > 1:
        log(f"{done.failed} of {done.images} images cannot be read.")
    if options.together:
        say_together(done.changed, done.images)
    if done.failed:
        raise Exit(1)


def load(options: PredictOptions, images: int) -> "Predictor":
    """The head for so many images, run by PyTorch or ONNX Runtime."""
    features = options.together or options.features is not None
    if options.on_onnx:
        from dcp_zoo.onnx.classifier import OnnxClassifier

        wanted: Values = {"reject": options.reject, "features": features}
        return OnnxClassifier(options.head, available_cores(), options.device, **wanted)
    from dcp_zoo.prediction.heads import HeadPredictor
    from dcp_zoo.training.device import pick_device
    from dcp_zoo.zoo.factory import create_model

    use_threads()
    model = create_model(opt.head_name(options.head), True, classnames=options.classnames)
    model = model.eval().to(pick_device(options.device))
    return HeadPredictor(model, features, options.precision, options.reject, images)


def depends_on(options: PredictOptions) -> Values:
    """What the predictions depend on besides the images: a run is continued only with the same."""
    own: Values = {"reject": options.reject}
    if options.on_onnx:
        if not Path(options.head).is_file():
            raise ZooError(f"There is no file {options.head}: create one with dcp-zoo export.")
        return own | {"runtime": "onnx", "file": sha256_of(Path(options.head))}
    from dcp_zoo.training.device import pick_device, pick_precision

    folder = head_folder(opt.head_name(options.head))
    precision = pick_precision(options.precision, read_config(folder)["architecture"], pick_device(options.device))
    own |= {"runtime": "torch", "head": head_sha256(folder), "classnames": options.classnames}
    return own | {"precision": precision}


def write_files(images: Sequence[str], options: PredictOptions) -> "Summary":
    from dcp_zoo.prediction.job import Job, OutputFiles, run

    outputs = OutputFiles(options.place, options.features, options.sheet, options.overwrite)
    outputs.check()  # before PyTorch is imported
    job, plan = Job(options.top_k, BATCH, options.together), depends_on(options)
    return run(images, partial(load, options, len(images)), job, outputs, plan, progress=progress_bar)


def show_on_screen(images: Sequence[str], options: PredictOptions) -> "Summary":
    """Print the predictions of all images."""
    if len(images) > ON_SCREEN and not options.as_json:
        raise ZooError(f"{len(images):,} images are too many for the screen: pass --output predictions.csv.")
    from dcp_zoo.answers import is_changed, label, written
    from dcp_zoo.prediction.job import Job, Summary

    job, predictor = Job(options.top_k, BATCH, options.together), load(options, len(images))
    batches = job.classify(images, predictor)
    if len(images) > FEW:
        batches = progress_bar(batches, "images", len(images), transient=True, size=lambda batch: len(batch.rows))
    rows = job.collect(batches, predictor.classnames)
    read = [row for row in rows if "predictions" in row]
    if options.as_json:
        print(json.dumps([*map(written, rows)], indent=1))
    elif len(read) > FEW:
        sure = ("" if row.get("rejected") else percent(row["predictions"][0]) for row in read)
        cells = [(row["image"], label(row), probability) for row, probability in zip(read, sure, strict=True)]
        output.print(plain_table(("image", "class", "probability"), cells))
        output.print("All classes: --json, or --output predictions.csv", style="dim")
    else:
        output.print(*map(predictions_table, read), sep="")
    if predictor.architecture == "dcp_mini" and not options.as_json:
        advise(MINIATURE_NOTE)
    errors = [row["error"] for row in rows if "error" in row]
    return Summary(len(rows), 0, len(errors), [row for row in rows if is_changed(row)], errors)


def say_together(changed: "Sequence[Row]", images: int) -> None:
    """Say how many predictions the other images changed, with examples."""
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
        bar = "█" * round(20 * prediction["probability"])
        table.add_row(escape(printable(prediction["class"])), f"{percent(prediction)}  {bar}")
    return table


def percent(prediction: Values) -> str:
    return f"{100 * prediction['probability']:5.1f} %"
