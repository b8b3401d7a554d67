"""`dcp-zoo predict`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, Exit, Option

import dcp_zoo
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import ERROR, log, output, plain_table, progress_bar, rejection_note, resumable
from dcp_zoo.data import find_images, load_image, sample_images
from dcp_zoo.data.packaged import SAMPLE_CLASSES
from dcp_zoo.errors import ZooError, attempted
from dcp_zoo.features import AUTO
from dcp_zoo.files import printable
from dcp_zoo.heads.config import read_config
from dcp_zoo.tables import NONE
from dcp_zoo.zoo.resolve import head_folder
from dcp_zoo.zoo.specs import DEFAULT_HEAD, MINIATURE_NOTE

if TYPE_CHECKING:
    from dcp_zoo.answers import Row

FEW = 8  # images with `top_k` classes each
NAMED = 10  # of the images that cannot be read
ON_SCREEN = 1000  # images whose results belong in a file
EXPLAINED = 50  # images, of each of which a person looks at a picture
FILES = "Files"  # a panel of the help


def predict(
    images: list[str] | None = Argument(
        None, help="Images, folders, patterns in quotes, or a .txt file with one path per line."
    ),
    head: opt.HeadName = DEFAULT_HEAD,
    classes: opt.Classes = None,
    top_k: int = Option(5, min=1, help="Predictions per image."),
    sample: bool = Option(False, "--sample", help="Classify six sample photographs; without --head, zero-shot."),
    reject: bool = Option(False, "--reject", help="Label images of other things `none of these`."),
    sets: float | None = Option(
        None,
        help="Also name the classes that each may be of, for 0.8, 0.9 or 0.95: in so many cases the right one is "
        "there.",
    ),
    together: bool = Option(
        False, "--together", help="Refine predictions with the other images, if these are of few classes."
    ),
    as_json: opt.AsJson = False,
    table: Path | None = Option(None, "--output", help="Write a .csv, .jsonl or .parquet file.", rich_help_panel=FILES),
    features: Path | None = Option(None, help="Write the image features to a .npz file.", rich_help_panel=FILES),
    sheet: Path | None = Option(
        None, help="Write a page to look at: the images of each class, the least certain first.", rich_help_panel=FILES
    ),
    explain: Path | None = Option(
        None,
        help="Write pictures into a folder: what in an image speaks for its class. Up to 50.",
        rich_help_panel=FILES,
    ),
    overwrite: bool = Option(False, "--overwrite", help="Replace existing files.", rich_help_panel=FILES),
    device: opt.Device = "auto",
    precision: opt.Precision = AUTO,
) -> None:
    """Classify images. The exit code is 1 if one cannot be read.

    --head may also be an .onnx file from dcp-zoo export: it runs with ONNX Runtime and without PyTorch.

    [dim]dcp-zoo predict --sample[/]
    [dim]dcp-zoo predict cat.jpg dog.jpg --classes "cat,dog,tea cup"[/]
    [dim]dcp-zoo predict PHOTOS --head my_head --output predictions.csv[/]
    [dim]dcp-zoo predict PHOTOS --head my_head --reject --output predictions.csv --sheet sheet.html[/]
    """
    if not (images or sample):
        raise ZooError("Pass images, a folder of images, or --sample for six photographs.")
    beside = features or sheet
    if table is None and beside:
        table = beside.with_suffix(".csv")
    if table and as_json:
        raise ZooError("--json prints to the screen: for a file use --output predictions.jsonl.")
    if sets is not None and together:
        raise ZooError("--sets are of each image alone: omit --together.")
    names = opt.class_list(classes)
    if sample and head == DEFAULT_HEAD and not (names or images or reject or sets):  # which need its own classes
        names = SAMPLE_CLASSES
        log(
            "Zero-shot: by the names of twelve classes. The head was trained on images of only one of these, "
            "butterfly. To train on images: dcp-zoo train MY_PHOTOS --output my_head"
        )
    predictor = dcp_zoo.Predictor(
        head,
        top_k=top_k,
        features=together or features is not None,
        reject=reject or None,
        device=device,
        precision=precision,
        classnames=names,
        sets=sets,
    )
    if reject and not (predictor.on_onnx or names):
        log(rejection_note(read_config(head_folder(str(predictor.head)))["dcp"]))
    paths = find_images([*(images or []), *(sample_images() if sample else [])])
    if explain and (predictor.on_onnx or len(paths) > EXPLAINED):
        raise ZooError(f"--explain draws each image, by a head's folder and no .onnx file: pass at most {EXPLAINED}.")
    from dcp_zoo.prediction.job import OutputFiles, errors_of, run

    if table:
        with resumable():
            errors = run(paths, predictor, OutputFiles(table, features, sheet, overwrite), together, progress_bar)
        log(f"Wrote {table}, with {len(paths):,} images.")
    else:
        errors = errors_of(show_on_screen(paths, predictor, together, as_json))
    for error in errors[:NAMED]:
        log(printable(error), ERROR)
    if explain:
        explain_each(paths, predictor, explain)
        log(f"What speaks for each class, in red: {explain}")
    if errors:
        log(f"{len(errors):,} of {len(paths):,} images cannot be read.")
        raise Exit(1)


def explain_each(images: Sequence[str], predictor: "dcp_zoo.Predictor", folder: Path) -> None:
    """Write a picture of each image that can be read."""
    backend: Any = predictor.backend
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(images, 1):
        image = attempted(load_image, path)
        if not isinstance(image, ZooError):  # which was printed already
            dcp_zoo.explain(backend.head, image).picture().save(folder / f"{number}_{Path(path).stem}.png")


def show_on_screen(images: Sequence[str], predictor: "dcp_zoo.Predictor", together: bool, as_json: bool) -> "list[Row]":
    """Print the predictions of all images: of a few the `top_k` classes, of more only the best."""
    if len(images) > ON_SCREEN and not as_json:
        raise ZooError(f"{len(images):,} images are too many for the screen: pass --output predictions.csv.")
    from dcp_zoo.prediction.job import classified

    are_few = len(images) <= FEW
    rows = classified(images, predictor, together, progress_bar)
    if as_json:
        print(json.dumps(rows, indent=1))
        return rows
    lines = []
    promised = [name for name in ("trusted", "set") if any(name in row for row in rows)]
    for row in rows:
        name = Path(row["image"]).name if are_few else row["image"]
        shown = [(NONE, "")] if row.get("rejected") else []
        shown += [(best["class"], f"{100 * best['probability']:5.1f} %") for best in row.get("predictions", [])]
        cells = {"trusted": "yes" if row.get("trusted") else "no", "set": ", ".join(row.get("set", []))}
        beside = [cells[name] for name in promised]
        for class_, probability in shown[: predictor.top_k if are_few else 1]:
            lines.append((name, class_, probability, *beside))
            name = ""  # once for each image
            beside = [""] * len(promised)
    output.print(plain_table(("image", "class", "probability", *promised), lines))
    if not are_few:
        output.print("All classes: --json, or --output predictions.csv", style="dim")
    if predictor.backend.architecture == "dcp_mini":
        log(MINIATURE_NOTE)
    return rows
