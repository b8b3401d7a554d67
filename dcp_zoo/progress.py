"""Progress bars, only in a terminal or a notebook, which vanish at the end; and durations."""

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

Progress = Callable[..., Iterable[Any]]  # (iterable, description, length) -> the iterable
DELAY = 1.0  # seconds before a bar is shown


def no_progress(iterable: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return iterable


def bar(items: Iterable[Any] | None, what: str, total: int | None = None, **options: Any) -> Any:
    """The items with a progress bar, in a terminal or a notebook; `options` are tqdm's, such as
    `disable`."""
    from tqdm import tqdm  # here, as the server's container lacks it

    is_watched = "ipykernel" in sys.modules or sys.stderr.isatty()
    settings = {"disable": not is_watched, "leave": False, "delay": DELAY}
    return tqdm(items, what, total, **settings | options)


def by_image(progress: Progress, batches: Iterable[Any], description: str, images: int, done: int = 0) -> Iterator[Any]:
    """The batches (inputs, ...) of the images that are not done; the progress bar counts all `images`."""
    counted = iter(progress(range(images), description, images))
    for _ in islice(counted, 1 + done):  # the first starts the bar at 0
        pass
    for batch in batches:
        yield batch
        for _ in islice(counted, len(batch[0])):
            pass


def format_duration(seconds: float) -> str:
    """90 -> "2 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
