"""Progress bars of plain text on stderr, which notebooks show without extensions; they vanish at the end."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def is_watched() -> bool:
    """Whether somebody sees stderr: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(items: Iterable[Any] | None, what: str, total: int | None = None, **options: Any) -> Any:
    """The items with a bar of their number; `total` is needed if they have no length."""
    from tqdm import tqdm  # which the server's container lacks

    return tqdm(items, what, total, leave=False, **options)


def track(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """`bar`, in a terminal."""
    return bar(items, what, total, disable=None)


@contextmanager
def download_bar(name: str) -> Iterator[Callable[[int, int | None], object]]:
    """A bar of bytes: a function that takes those that are here and, if known, all."""
    with bar(None, name, unit="B", unit_scale=True, disable=None) as shown:

        def advance(done: int, total: int | None) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield advance
