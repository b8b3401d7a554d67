"""`dcp-zoo predict`."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dcp_zoo.cli.console import errors, log, output, print_error, progress_bar
from dcp_zoo.cli.options import Classes, Context, Device, Head, Threads, class_list, head_name
from dcp_zoo.cli.threads import available_cores, use_threads
from dcp_zoo.data import load_image
from dcp_zoo.data.samples import sample_images
from dcp_zoo.errors import ZooError

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP

FEW = 8  # images that need no progress bar
MINIATURE_NOTE = "dcp_mini is a miniature for trying things out: expect mistakes that CLIP itself would not make."


def predict(
    images: Annotated[list[str] | None, typer.Argument(help="Image files.")] = None,
    head: Head = "dcp_mini.caltech101-16shot",
    classes: Classes = None,
    top_k: Annotated[int, typer.Option(min=1, help="Predictions per image.")] = 5,
    sample: Annotated[bool, typer.Option("--sample", help="Classify scikit-learn's two sample photographs.")] = False,
    context: Context = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch; it does not affect the predictions.")] = 32,
    device: Device = "auto",
    threads: Threads = None,
    onnx: Annotated[
        Path | None, typer.Option(help="A file from `dcp-zoo export`, run with ONNX Runtime instead of --head.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify images. The exit code is 1 if one cannot be read.

    [dim]dcp-zoo predict --sample[/]
    [dim]dcp-zoo predict cat.jpg dog.jpg --classes "cat,dog,tea cup"[/]
    """
    paths = [*(images or []), *(sample_images() if sample else [])]
    if not paths:
        raise ZooError("Pass at least one image file, or --sample for two photographs.")
    for folder in filter(os.path.isdir, paths):
        raise ZooError(f"{folder} is a folder: pass its images, as in {Path(folder) / '*.jpg'}.")
    if onnx:
        if classes or context:
            raise ZooError("The classes and context of an exported file are fixed: export it again with --classes.")
        classifier = onnx_classifier(onnx, top_k, threads)
    else:
        name, names = head_name(head), class_list(classes)
        from dcp_zoo.training.loop import pick_device
        from dcp_zoo.zoo.factory import create_model

        use_threads(threads)
        model = create_model(name, True, classnames=names, context=context).eval().to(pick_device(device))
        classifier = torch_classifier(model, top_k)
    answers: Iterable[Any] = classify(classifier, paths, batch_size)
    if len(paths) > FEW:
        answers = progress_bar(answers, "images", len(paths), transient=True)
    failed = show(list(answers), as_json)
    if classifier.architecture == "dcp_mini" and not as_json:
        errors.print(MINIATURE_NOTE, style="dim", highlight=False)
    if failed:
        raise typer.Exit(1)


Predictions = list[dict[str, Any]]  # class names and probabilities, best first


@dataclass(frozen=True)
class Classifier:
    """A loaded head.

    Attributes:
        architecture: name of its model.
        preprocess: an image -> an input of `predict`; called in threads.
        predict: a batch of inputs -> their predictions.
    """

    architecture: str
    preprocess: Callable[[Any], Any]
    predict: Callable[[list[Any]], list[Predictions]]


def onnx_classifier(path: Path, top_k: int, threads: int | None) -> Classifier:
    """Classify with an exported file."""
    import numpy as np

    from dcp_zoo.deploy.onnx_classifier import OnnxClassifier

    exported = OnnxClassifier(path, threads or available_cores())
    return Classifier(
        exported.info["model"], exported.preprocess, lambda batch: exported.classify_batch(np.stack(batch), top_k)
    )


def torch_classifier(model: "DCP", top_k: int) -> Classifier:
    """Classify with a model: in batches if its context is calibrated, otherwise each image as its own batch."""
    import torch

    from dcp_zoo.zoo.factory import create_transform

    fused = model.fuse() if model.context == "calibrated" else None

    @torch.inference_mode()
    def predict(batch: list[torch.Tensor]) -> list[Predictions]:
        images = torch.stack(batch).to(model.device)
        logits = fused(images) if fused else torch.cat([model(image) for image in images.split(1)])
        best = logits.softmax(-1).topk(min(top_k, model.num_classes))
        return [
            [{"class": model.classnames[i], "probability": round(p, 4)} for i, p in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    return Classifier(model.architecture, create_transform(model), predict)


def classify(
    classifier: Classifier, paths: Sequence[str], batch_size: int = 1
) -> Iterator[tuple[str, Predictions | ZooError]]:
    """Each path with its predictions, or with the error of an image that cannot be read; in order."""

    def read(path: str) -> Any:
        try:
            return classifier.preprocess(load_image(path))
        except ZooError as error:
            return error

    with ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            inputs = list(pool.map(read, batch))
            readable = [x for x in inputs if not isinstance(x, ZooError)]
            predictions = iter(classifier.predict(readable) if readable else [])
            for path, x in zip(batch, inputs, strict=True):
                yield path, x if isinstance(x, ZooError) else next(predictions)


def show(answers: Sequence[tuple[str, Predictions | ZooError]], as_json: bool) -> int:
    """Print predictions, then the images that cannot be read; returns how many these are."""
    failed = [answer for _, answer in answers if isinstance(answer, ZooError)]
    if as_json:
        entries = [
            {"image": path} | ({"error": str(answer)} if isinstance(answer, ZooError) else {"predictions": answer})
            for path, answer in answers
        ]
        print(json.dumps(entries, indent=1))
    else:
        for path, answer in answers:
            if not isinstance(answer, ZooError):
                output.print(predictions_table(path, answer))
    for error in failed:
        print_error(str(error))
    if failed and len(answers) > 1:
        log(f"{len(failed)} of {len(answers)} images cannot be read.")
    return len(failed)


def predictions_table(path: str, predictions: Predictions) -> Table:
    """One row per class."""
    table = Table("class", "probability", title=Path(path).name, title_justify="left")
    for row in predictions:
        bar = "█" * round(20 * row["probability"])
        table.add_row(row["class"], f"{100 * row['probability']:5.1f} %  {bar}")
    return table
