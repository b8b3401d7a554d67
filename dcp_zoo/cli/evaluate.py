"""`dcp-zoo eval`."""

import json
from typing import Annotated

import typer

from dcp_zoo.cli.console import output, progress_bar
from dcp_zoo.cli.options import BatchSize, Context, DataRoot, Device, Precision, Workers, head_name
from dcp_zoo.data import load_split
from dcp_zoo.errors import ZooError


def evaluate(
    head: Annotated[str, typer.Option(help="A head (dcp_mini.caltech101-16shot), a folder or hf-hub:ORG/REPO.")],
    dataset: Annotated[str | None, typer.Option(help="Default: the dataset that the head was trained on.")] = None,
    data_root: DataRoot = None,
    context: Context = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a head's top-1 accuracy on the test images of a dataset.

    [dim]dcp-zoo eval --head dcp_mini.caltech101-16shot --data-root DATA[/]
    """
    from dcp_zoo.training.loop import pick_device, predict, top1
    from dcp_zoo.training.sources import image_source
    from dcp_zoo.zoo.factory import create_model

    model = create_model(head_name(head), True, context=context).eval().to(pick_device(device))
    dataset = dataset or model.info.get("dataset")
    if dataset is None:
        raise ZooError(f"{head} does not say what it was trained on: name a --dataset.")
    split = load_split(dataset, data_root)
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
