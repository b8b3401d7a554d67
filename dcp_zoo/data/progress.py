"""Progress bars on stderr."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console


def is_watched() -> bool:
    """Whether somebody sees stderr: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def plain_track(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """The items with a bar of plain text, which a notebook shows without extensions; it vanishes at the end."""
    from tqdm import tqdm  # which the server's container lacks

    return tqdm(items, what, total, leave=False)


def track(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """The items with a bar of their number in a terminal; `total` is needed if they have no length."""
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
