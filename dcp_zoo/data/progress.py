"""Progress bars of plain text on stderr, which notebooks show without extensions; they vanish at the end."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

# (iterable, description, length) -> the iterable; of many images also `done` and `size`, see `cli.console.progress_bar`
Progress = Callable[..., Iterable[Any]]


def no_progress(iterable: Iterable[Any], description: str, total: int, **counts: object) -> Iterable[Any]:
    return iterable


def is_watched() -> bool:
    """Whether somebody sees stderr: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(items: Iterable[Any] | None, what: str, total: int | None = None, **options: Any) -> Any:
    """The items with a bar of their number, with disable=None only in a terminal; `total`: if they have no length."""
    from tqdm import tqdm  # which the server's container lacks

    return tqdm(items, what, total, leave=False, **options)
