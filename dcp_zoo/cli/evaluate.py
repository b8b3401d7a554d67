"""`dcp-zoo eval`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcp_zoo.cli.console import log, output, progress_bar
from dcp_zoo.cli.options import (
    BatchSize,
    Context,
    DataRoot,
    Device,
    Head,
    Precision,
    Threads,
    Workers,
    data_source,
    head_name,
)
from dcp_zoo.cli.threads import use_threads
from dcp_zoo.data import check_images, load_split
from dcp_zoo.data.splits import shorten
from dcp_zoo.errors import ZooError

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP

OWN_IMAGES = {  # datasets without a name of their own, and the options that give their images
    "folder": "--data-root FOLDER",
    "photos": "--dataset folder --data-root FOLDER",  # trained in the demo
}


def evaluate(
    head: Head,
    dataset: Annotated[str | None, typer.Option(help="Default: the dataset the head was trained on.")] = None,
    data_root: DataRoot = None,
    context: Context = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = 0,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a head's top-1 accuracy on the test images of a dataset.

    [dim]dcp-zoo eval --head dcp_mini.caltech101-16shot --data-root DATA[/]
    """
    name = head_name(head)
    data_source(None, dataset, data_root)
    from dcp_zoo.training.loop import pick_device, predict, top1
    from dcp_zoo.training.sources import image_source
    from dcp_zoo.zoo.factory import create_model

    use_threads(threads)
    model = create_model(name, True, context=context).eval().to(pick_device(device))
    dataset = dataset or trained_on(head, model, data_root)
    split = load_split(dataset, data_root)
    if dataset == "folder":
        check_images(split.test)
    if set(split.classnames) != set(model.classnames):
        log(
            f"Note: {head} was trained on {model.num_classes} classes. It is tested with the {len(split.classnames)} "
            f"class names of {dataset}, as in the cross-dataset protocol."
        )
    model.set_classnames(split.classnames)
    source = image_source(model, split.test, "none", workers, progress_bar)
    logits = predict(source, batch_size, precision, progress_bar)
    result = {
        "head": head,
        "dataset": dataset,
        "images": len(source.items),
        "context": model.context,
        "batch_size": batch_size,
        "top1": top1(logits, source.labels),
    }
    if as_json:
        print(json.dumps(result))
        return
    output.print(
        f"{head} on {result['images']} test images of {dataset}, {model.context} context: "
        f"top-1 [bold]{result['top1']:.2f} %[/]",
        highlight=False,
    )


def trained_on(head: str, model: "DCP", data_root: Path | None) -> str:
    """The dataset that a head was trained on; ZooError if it is not stored, or the data root is missing or not used."""
    dataset = model.info.get("dataset")
    if dataset is None:
        raise ZooError(f"{head} does not store its training dataset: pass --dataset NAME.")
    if dataset in OWN_IMAGES and (data_root is None or dataset != "folder"):
        raise ZooError(
            f"{head} was trained on your own images of the classes {shorten(model.classnames)}. Pass their folder, or "
            f"another one with test images of these classes: {OWN_IMAGES[dataset]}."
        )
    data_source(None, dataset, data_root)
    return dataset
