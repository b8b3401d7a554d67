"""Progress bars on stderr, where that is a terminal."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console


def track(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """The items with a bar of their number; `total` is needed if they have no length."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return progress.track(items, what, total, console=console, transient=True, disable=hidden)


@contextmanager
def download_bar(name: str) -> Iterator[Callable[[int, int | None], object]]:
    """A bar of bytes: a function that takes those that are here and, if known, all."""
    console = Console(stderr=True)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
    rates = (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*columns, *rates, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
