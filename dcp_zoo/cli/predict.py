"""`dcp-zoo predict`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import advise, log, output, plain_table, print_error, progress_bar, rejection_note
from dcp_zoo.data.find import find_images
from dcp_zoo.data.images import load_image, no_progress
from dcp_zoo.data.packaged import SAMPLE_CLASSES, sample_images
from dcp_zoo.errors import ZooError, attempted
from dcp_zoo.fields import Values
from dcp_zoo.files import printable
from dcp_zoo.heads.config import read_config
from dcp_zoo.tables import NONE
from dcp_zoo.training.recipes import AUTO
from dcp_zoo.zoo.registry import DEFAULT_HEAD, MINIATURE_NOTE
from dcp_zoo.zoo.resolve import head_folder

if TYPE_CHECKING:
    from dcp_zoo.answers import Row
    from dcp_zoo.prediction import Predictor
    from dcp_zoo.prediction.job import Told

FEW = 8  # images with `top_k` classes each, and without a progress bar
NAMED = 10  # of the images that cannot be read
ON_SCREEN = 1000  # images whose results belong in a file
EXPLAINED = 50  # images, of each of which a person looks at a picture
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
    table: Path | None = to_file("Write a .csv, .jsonl or .parquet file.", "--output")
    features: Path | None = to_file("Write the image features to a .npz file.")
    sheet: Path | None = to_file("Write a page to look at: the images of each class, the least certain first.")
    explain: Path | None = to_file("Write pictures into a folder: what in an image speaks for its class. Up to 50.")
    overwrite: bool = opt.option(False, "Replace existing files.", rich_help_panel="Files")
    device: opt.Device = "auto"
    precision: opt.Precision = AUTO

    @property
    def place(self) -> Path | None:
        """The table's file, if files are written: without --output named after the other one."""
        other = self.features or self.sheet
        return self.table or (other.with_suffix(".csv") if other else None)

    @property
    def classnames(self) -> list[str] | None:
        """The names in place of the head's, if any: of the sample, unless to reject, which needs the head's own."""
        only_sample = self.sample and not (self.images or self.reject) and self.head == DEFAULT_HEAD
        return opt.class_list(self.classes) or (SAMPLE_CLASSES if only_sample else None)

    def check(self) -> None:
        """Raise ZooError for options that do not fit together."""
        if not (self.images or self.sample):
            raise ZooError("Pass images, a folder of images, or --sample for six photographs.")
        if self.place and self.as_json:
            raise ZooError("--json prints to the screen: for a file use --output predictions.jsonl.")


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
    from dcp_zoo.prediction import Predictor

    sources = [*(options.images or []), *(sample_images() if options.sample else [])]
    given: Values = {"device": options.device, "precision": options.precision, "classnames": options.classnames}
    features = options.together or options.features is not None
    predictor = Predictor(options.head, "image", options.top_k, features, options.reject or None, **given)
    if options.reject and not (predictor.on_onnx or options.as_json or predictor.classnames):
        config = read_config(head_folder(str(predictor.head)))
        if note := rejection_note(config["dcp"], options.reject):
            log(note)
    images = find_images(sources)
    if options.explain and (predictor.on_onnx or len(images) > EXPLAINED):
        problem = "an exported file has no gradients" if predictor.on_onnx else f"of at most {EXPLAINED}"
        raise ZooError(f"--explain shows images by a head, {problem}: pass its folder, and fewer images.")
    classify = write_files if options.place else show_on_screen
    errors, changed = classify(images, predictor, options)
    for error in errors[:NAMED]:
        print_error(printable(error))
    if options.place:
        bad = f", of which {len(errors):,} cannot be read" if errors else ""
        log(f"{len(images):,} image{'s' * (len(images) != 1)}{bad}: {options.place}")
    elif errors and len(images) > 1:
        log(f"{len(errors)} of {len(images)} images cannot be read.")
    if options.explain:
        explain(images, predictor, options.explain)
        log(f"What speaks for each class, in red: {options.explain}")
    if options.together:
        log(f"The other images changed {changed:,} of {len(images):,} predictions.")
    if errors:
        raise Exit(1)


def write_files(images: Sequence[str], predictor: "Predictor", options: PredictOptions) -> "Told":
    from dcp_zoo.prediction.job import OutputFiles, run

    assert options.place
    outputs = OutputFiles(options.place, options.features, options.sheet, options.overwrite)
    return run(images, predictor, outputs, options.together, progress_bar)


def explain(images: Sequence[str], predictor: "Predictor", folder: Path) -> None:
    """Write a picture of each image that can be read."""
    from dcp_zoo.api import functions
    from dcp_zoo.prediction.heads import HeadBackend

    assert isinstance(predictor.backend, HeadBackend)
    folder.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(images, 1):
        if not isinstance(image := attempted(load_image, path), ZooError):  # of others, the error has been told
            functions.explain(predictor.backend.head, image).picture().save(folder / f"{i}_{Path(path).stem}.png")


def show_on_screen(images: Sequence[str], predictor: "Predictor", options: PredictOptions) -> "Told":
    """Print the predictions of all images."""
    if len(images) > ON_SCREEN and not options.as_json:
        raise ZooError(f"{len(images):,} images are too many for the screen: pass --output predictions.csv.")
    from dcp_zoo.answers import written
    from dcp_zoo.prediction.job import classified, told

    shows = partial(progress_bar, transient=True) if len(images) > FEW else no_progress
    rows = classified(images, predictor, options.together, shows)
    if options.as_json:
        print(json.dumps([*map(written, rows)], indent=1))
    else:
        top_k = options.top_k if len(images) <= FEW else 1
        output.print(plain_table(("image", "class", "probability"), chain(*(cells(row, top_k) for row in rows))))
        if len(images) > FEW:
            output.print("All classes: --json, or --output predictions.csv", style="dim")
    if predictor.backend.architecture == "dcp_mini" and not options.as_json:
        advise(MINIATURE_NOTE)
    return told(rows)


def cells(row: "Row", lines: int) -> list[tuple[str, str, str]]:
    """So many lines of a table for an image, if it can be read: its most probable classes."""
    names = chain([Path(row["image"]).name if lines > 1 else row["image"]], repeat(""))
    shown = [(NONE, "")] if row.get("rejected") else []
    shown += [(best["class"], f"{100 * best['probability']:5.1f} %") for best in row.get("predictions", [])]
    return [(name, *pair) for name, pair in zip(names, shown[:lines], strict=False)]
