"""`dcp-zoo export`."""

from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import output
from dcp_zoo.cli.options import class_list, head_name


def export(
    head: Annotated[
        str, typer.Argument(help="A head (dcp_mini.caltech101-16shot), a checkpoint folder or hf-hub:ORG/REPO.")
    ],
    file: Annotated[Path | None, typer.Option("--output", help="Default: the head's name with a suffix, here.")] = None,
    format: Annotated[str, typer.Option(help="onnx, torch-export or safetensors.")] = "onnx",
    classes: Annotated[str | None, typer.Option(help="Other class names, with commas between them.")] = None,
) -> None:
    """Write a head as one file that classifies without this package, and check it against the model.

    [dim]dcp-zoo export dcp_mini.caltech101-16shot --format onnx[/]
    [dim]dcp-zoo predict photo.jpg --onnx dcp_mini.caltech101-16shot.onnx[/]
    """
    from dcp_zoo.deploy.export import SUFFIXES
    from dcp_zoo.deploy.export import export as write
    from dcp_zoo.zoo.factory import create_model

    model = create_model(head_name(head), True, classnames=class_list(classes)).eval()
    path = write(model, file or Path(Path(head).name + SUFFIXES.get(format, "")), format)
    megabytes = path.stat().st_size / 1e6
    output.print(f"Wrote {path} ({megabytes:.0f} MB, {model.num_classes} classes), checked against the model.")
