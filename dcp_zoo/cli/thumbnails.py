"""Small pictures beside the answers, in terminals that show them."""

import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec

from PIL.Image import Image
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table

from dcp_zoo.cli.console import output

WIDTH, HEIGHT = 24, 9  # in characters, which are about twice as high as wide; a table of five classes has ten lines
ROOM = 80  # characters of a line that a picture and a table need


def can_show_pictures() -> bool:
    """Whether the output is a terminal with colours and room, where someone is looking."""
    if os.environ.get("CI") or not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    if output.no_color or output.color_system not in ("256", "truecolor") or output.width < ROOM:
        return False
    return find_spec("textual_image") is not None  # the server's container has only what the server needs


def picture_maker() -> Callable[[Image], RenderableType]:
    """What turns an image into a picture: with Sixel or Kitty's protocol if the terminal says that it has them, else
    of half blocks."""
    logging.getLogger("textual_image").setLevel(
        logging.ERROR
    )  # it warns of terminals that do not tell their font's size
    from textual_image.renderable import Image as Picture  # asks the terminal

    def make(image: Image) -> RenderableType:
        if image.width * 2 * HEIGHT > image.height * WIDTH:
            return Picture(image, width=WIDTH, height="auto")
        return Picture(image, width="auto", height=HEIGHT)

    return make


def beside(picture: RenderableType, table: RenderableType) -> Table:
    """A picture and a table, side by side."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=WIDTH)
    grid.add_row(Padding(picture, (0, 0, 1, 0)), table)
    return grid
