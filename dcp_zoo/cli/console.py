"""The terminal: tables and results on stdout; progress, notes, advice and errors on stderr."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Column, Table

from dcp_zoo.data.images import bar
from dcp_zoo.fields import Values
from dcp_zoo.files import cache_folder, file_name, printable, printable_lines
from dcp_zoo.heads.config import ACCEPTED
from dcp_zoo.tables import REFUSED

QUIET = 30.0  # seconds between the lines of a log that show where a run is


class SafeConsole(Console):
    """A terminal that names cannot command: everything printed passes here, see `printable`. Only lines may end."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable_lines(text), style, control)


output = SafeConsole(highlight=False)
errors = SafeConsole(stderr=True, highlight=False)


def progress_bar(items: Iterable[Any], what: str, total: int, **options: Any) -> Iterable[Any]:
    """The items with a bar of their number: in a terminal until the end; in a log a line now and then."""
    in_log: Values = {"disable": False, "leave": True, "mininterval": QUIET, "delay": QUIET}
    return bar(items, what, total, **({} if errors.is_terminal else in_log) | options)


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines; its texts are shown verbatim, each on one line or, where they do not fit, folded."""
    table = Table(*(Column(name, overflow="fold") for name in header), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(printable(text)) for text in row))
    return table


def print_error(text: str) -> None:
    errors.print(f"[bold red]Error:[/] {escape(from_here(text))}", soft_wrap=True)


def log(text: str) -> None:
    """Print a message next to progress bars, verbatim: brackets are not markup."""
    errors.print(from_here(text), markup=False)


def from_here(text: str) -> str:
    """A text whose paths in the working folder start there."""
    here = str(Path.cwd())
    return text if here == os.sep else re.sub(rf"(?<![^\s('\"]){re.escape(here + os.sep)}", "", text)


def advise(text: str) -> None:
    """Print advice, each only once: a file in the user's cache remembers it."""
    mark = cache_folder("advice") / file_name(text)[:30]
    if not mark.exists():
        log(text)
        with suppress(OSError):  # said again, then
            mark.touch()


def rejection_note(info: Mapping[str, Any], reject: float = True) -> str:
    """What else a head with this `info` accepts if this share of its classes' images may be rejected; "" if unknown."""
    rate, fitted = REFUSED if reject is True else reject, info.get("text_probe", {})
    similar, everyday = (fitted.get(name, {}).get(f"{rate:g}") for name in ACCEPTED)
    said = []
    if similar is not None:
        said += [f"Of things much like its classes it accepts about {similar:.0f} %, measured by leaving classes out"]
        said[0] += "." if everyday is None else f"; of thirty everyday pictures {everyday:.0f} %."
    if examples := fitted.get("examples"):
        said += [f"It rejects what is much like its {examples:,} examples of none of these."]
    measured = bool(fitted.keys() & set(ACCEPTED))  # for these classes
    known = [f"{100 * rate:g} % of the images of the head's classes are rejected."] * measured
    return " ".join([*known, *said]) if said else ""
