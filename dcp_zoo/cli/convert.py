"""`dcp-zoo convert`."""

from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import output, progress_bar
from dcp_zoo.cli.options import Device, check_output
from dcp_zoo.data import Item
from dcp_zoo.data.class_file import read_classnames
from dcp_zoo.data.find import find_images


def convert(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A file model.pth.tar-N of the authors' code (CMPA).")],
    model: Annotated[str, typer.Option(help="The model whose CLIP it was trained on, such as dcp_vitb16.")],
    classnames: Annotated[
        Path, typer.Option(help="File of class names in label order: one per line, `wnid name` lines or a JSON list.")
    ],
    output_dir: Annotated[Path, typer.Option("--output", help="Folder for the checkpoint; created if needed.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the training images, whose prompt statistics are stored.")
    ] = None,
    depth: Annotated[int, typer.Option(help="Coupled blocks it was trained with; not stored in the file.")] = 9,
    pooling: Annotated[str, typer.Option(help="Pooling it was trained with: mean, max or first.")] = "mean",
    device: Device = "auto",
) -> None:
    """Convert a checkpoint of the authors' released code. Nothing in the file is executed.

    [dim]dcp-zoo convert MultiModalPromptLearner/model.pth.tar-20 --model dcp_vitb16 --classnames names.txt
    --output my_head[/]
    """
    from dcp_zoo.training.device import pick_device
    from dcp_zoo.training.methods.dcp import round_and_store_stats
    from dcp_zoo.training.sources import image_source
    from dcp_zoo.zoo.convert import convert_cmpa_checkpoint

    check_output(output_dir)
    names = read_classnames(classnames)
    dcp = convert_cmpa_checkpoint(path, classnames=names, model=model, depth=depth, pooling=pooling)
    dcp.to(pick_device(device))
    if images is not None:
        items = [Item(image.path, image.name, 0) for image in find_images([str(images)])]
        round_and_store_stats(image_source(dcp, items, progress=progress_bar))
    dcp.save_pretrained(output_dir)
    hint = "" if images else " It has no stored statistics: logits depend on the batch. Pass --images to store them."
    output.print(f"Saved in {output_dir}.{hint}")
