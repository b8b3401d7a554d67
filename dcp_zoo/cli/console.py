"""What all commands print with: tables and answers on stdout; progress, notes and errors on stderr."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

output = Console()
errors = Console(stderr=True)


def progress_bar(iterable: Iterable[Any], description: str, total: int, transient: bool = False) -> Iterable[Any]:
    """Yield from `iterable` behind a progress bar with counts and times; a `transient` one leaves no trace."""
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


def log(text: str) -> None:
    """A message beside the progress bars, printed as it is: brackets in it are not markup."""
    errors.print(text, highlight=False, markup=False)
