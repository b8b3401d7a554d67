"""Small pictures beside the answers, in terminals that show them."""

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table

from dcp_zoo.cli.console import errors, output

WIDTH, HEIGHT = 24, 9  # in characters, which are about twice as high as wide; a table of five classes has ten lines
ROOM = 80  # characters of a line that a picture and a table need
HINT = "To see the images here too: pip install 'dcp_zoo[pictures]'"


def beside_pictures(tables: Sequence[Table], paths: Iterable[str]) -> Sequence[Table]:
    """The tables, with the images at `paths` beside them where the output shows pictures.

    With Sixel or Kitty's protocol if the terminal says that it has them, else of half blocks.
    """
    if not _someone_looks():
        return tables
    if find_spec("textual_image") is None:
        errors.print(HINT, style="dim", highlight=False, markup=False)
        return tables
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # it warns of terminals that do not tell their font size
    from textual_image.renderable import Image as Picture  # asks the terminal

    from dcp_zoo.data.images import load_image

    def picture(path: str) -> RenderableType:
        image = load_image(path)
        if image.width * 2 * HEIGHT > image.height * WIDTH:
            return Picture(image, width=WIDTH, height="auto")
        return Picture(image, width="auto", height=HEIGHT)

    return [_side_by_side(picture(path), table) for path, table in zip(paths, tables, strict=True)]


def _someone_looks() -> bool:
    """Whether the output is a terminal with colours and room, where someone is looking."""
    if os.environ.get("CI") or not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return not output.no_color and output.color_system in ("256", "truecolor") and output.width >= ROOM


def _side_by_side(picture: RenderableType, table: Table) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=WIDTH)
    grid.add_row(Padding(picture, (0, 0, 1, 0)), table)
    return grid
