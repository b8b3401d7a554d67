"""The output of all commands: tables and results on stdout; progress, notes and errors on stderr."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

output = Console()
errors = Console(stderr=True)


def progress_bar(
    iterable: Iterable[Any],
    description: str,
    total: int,
    transient: bool = False,
    done: int = 0,
    size: Callable[[Any], int] = lambda item: 1,
) -> Iterator[Any]:
    """Yield from `iterable` with a progress bar of counts, times and the rate.

    Args:
        iterable: what to yield.
        description: the unit of the counts.
        total: the count at the end.
        transient: remove the bar at the end, and show none where stderr is no terminal.
        done: the count at the start, which does not affect the rate.
        size: how much an item adds to the count.
    """
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    disable = transient and not errors.is_terminal
    with Progress(*columns, console=errors, transient=transient, disable=disable) as bar:
        task = bar.add_task(description, total=total, completed=done)
        for item in iterable:
            yield item
            bar.advance(task, size(item))


class Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g}/s" if speed else "", "progress.data.speed")


def print_error(text: str) -> None:
    """Print an error message."""
    errors.print(f"[bold red]Error:[/] {escape(text)}", highlight=False, soft_wrap=True)


def log(text: str) -> None:
    """Print a message next to progress bars, verbatim: brackets are not markup."""
    errors.print(text, highlight=False, markup=False)
