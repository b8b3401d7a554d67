"""The terminal: tables and results on stdout; progress, notes, advice and errors on stderr."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Column, Table

from dcp_zoo.files import printable, printable_lines
from dcp_zoo.heads.config import ACCEPTED
from dcp_zoo.progress import bar
from dcp_zoo.rejection import REFUSED

ERROR = "[bold red]Error:[/] "
QUIET = 30.0  # seconds between the lines of a log that show where a run is


class SafeConsole(Console):
    """A terminal that names cannot command: everything printed passes here, see `printable`. Only lines may
    end."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable_lines(text), style, control)


output = SafeConsole(highlight=False)
errors = SafeConsole(stderr=True, highlight=False)


def progress_bar(items: Iterable[Any], what: str, total: int, **options: Any) -> Iterable[Any]:
    """The items with a bar of their number: in a terminal until the end; in a log a line now and then."""
    if not errors.is_terminal:
        options = {"disable": False, "leave": True, "mininterval": QUIET, "delay": QUIET} | options
    return bar(items, what, total, **options)


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines; its texts are shown verbatim, each on one line or, where they do not fit,
    folded."""
    table = Table(*(Column(name, overflow="fold") for name in header), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(printable(text)) for text in row))
    return table


def log(text: str, mark: str = "") -> None:
    """Print a message, if there is one, next to progress bars; its brackets are not markup, those of a `mark`
    before it are."""
    if text:
        errors.print(f"{mark}{escape(from_here(text))}", soft_wrap=bool(mark))


def from_here(text: str) -> str:
    """A text whose paths in the working folder start there."""
    here = str(Path.cwd())
    return text if here == os.sep else re.sub(rf"(?<![^\s('\"]){re.escape(here + os.sep)}", "", text)


@contextmanager
def resumable() -> Iterator[None]:
    """Print how to go on if the work in the context is stopped by Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        log("Stopped. What was computed is kept: repeat the command to go on.")
        raise


def rejection_note(info: Mapping[str, Any]) -> str:
    """What --reject accepts and rejects with a head of this `info`, in sentences; "" if it was not
    measured."""
    probe = info.get("text_probe", {})
    near, far = [probe.get(name, {}).get(f"{REFUSED:g}") for name in ACCEPTED]
    sentences = []
    if near is not None or far is not None:
        sentences.append(f"{100 * REFUSED:g} % of the images of the head's classes are rejected.")
    if near is not None:
        sentences.append(
            f"Of things much like its classes it accepts about {near:.0f} %, measured by leaving classes out."
        )
    if far is not None:
        sentences.append(f"Of thirty everyday pictures it accepts {far:.0f} %.")
    if probe.get("examples"):
        sentences.append(f"It rejects what is much like its {probe['examples']:,} examples of none of these.")
    return " ".join(sentences)
