"""The output of all commands: tables and results on stdout; progress, notes and errors on stderr."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

output = Console()
errors = Console(stderr=True)


def progress_bar(iterable: Iterable[Any], description: str, total: int, transient: bool = False) -> Iterable[Any]:
    """Yield from `iterable` with a progress bar of counts and times; a `transient` one is removed at the end."""
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    disable = transient and not errors.is_terminal
    with Progress(*columns, console=errors, transient=transient, disable=disable) as bar:
        yield from bar.track(iterable, total=total, description=description)


def print_error(text: str) -> None:
    """Print an error message."""
    errors.print(f"[bold red]Error:[/] {escape(text)}", highlight=False, soft_wrap=True)


def log(text: str) -> None:
    """Print a message next to progress bars, verbatim: brackets are not markup."""
    errors.print(text, highlight=False, markup=False)
