"""`dcp-zoo search`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dcp_zoo.cli.console import log, output, progress_bar
from dcp_zoo.cli.options import Device, Model, Threads, check_output
from dcp_zoo.threads import use_threads

MINIATURE = (
    "dcp_mini was trained with the names of everyday things: it finds these, but does not understand sentences. For "
    "those use a real CLIP: --model dcp_vitb32."
)


def search(
    folder: Annotated[Path, typer.Argument(help="Folder with images, also in subfolders.")],
    text: Annotated[str | None, typer.Argument(help="What to find, in words.")] = None,
    like: Annotated[Path | None, typer.Option(metavar="PHOTO", help="Find images that look like this one.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 20,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with the images as pictures.")
    ] = None,
    model: Model = "dcp_mini",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Find images by a text or by another image. Features are computed once and kept in the user's cache.

    [dim]dcp-zoo search MY_PHOTOS "tea cup" --sheet cups.html[/]
    [dim]dcp-zoo search MY_PHOTOS --like photo.jpg[/]
    """
    if sheet is not None:
        check_output(sheet.parent, "--sheet")
    use_threads(threads)
    from dcp_zoo.inspection.search import search as find

    found = find(folder, text, like=like, count=count, model=model, device=device, sheet=sheet, progress=progress_bar)
    for match in found:
        output.print(f"{match.similarity:.3f}  {escape(match.path)}", highlight=False, soft_wrap=True)
    if text and model == "dcp_mini":
        log(MINIATURE)
