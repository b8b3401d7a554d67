"""`dcp-zoo demo`."""

from dataclasses import fields
from typing import Annotated

import typer

from dcp_zoo.cli.options import HeadName, head_name
from dcp_zoo.demo import DIGITS_HEAD, VisitorLimits, launch

HELP = {part.name: part.metadata["help"] for part in fields(VisitorLimits)}


def demo(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    head: HeadName = DIGITS_HEAD,
    max_photos: Annotated[int, typer.Option(help=HELP["photos"])] = VisitorLimits.photos,
    max_classes: Annotated[int, typer.Option(help=HELP["classes"])] = VisitorLimits.classes,
    max_shots: Annotated[int, typer.Option(help=HELP["shots"])] = VisitorLimits.shots,
) -> None:
    """Try heads in the browser: classify, look inside, train on a few photographs. Stop with Ctrl-C.

    [dim]dcp-zoo demo[/]
    [dim]dcp-zoo demo --head my_head --port 8000[/]
    """
    launch(head_name(head), host, port, VisitorLimits(max_photos, max_classes, max_shots))
