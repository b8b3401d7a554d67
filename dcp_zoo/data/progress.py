"""Progress bars where somebody watches: in a terminal or a notebook. They vanish at the end."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from typing import Any

# (iterable, description, length) -> the iterable; of many images also `done` and `size`, see `cli.console.progress_bar`
Progress = Callable[..., Iterable[Any]]
DELAY = 1.0  # seconds before a bar is shown


def no_progress(iterable: Iterable[Any], description: str, total: int, **counts: object) -> Iterable[Any]:
    return iterable


def bar(items: Iterable[Any] | None, what: str, total: int | None = None, **options: Any) -> Any:
    """The items with a bar of their number, in a terminal or a notebook; `options` are tqdm's, such as `disable`."""
    in_notebook = "ipykernel" in sys.modules
    if in_notebook and find_spec("ipywidgets"):
        from tqdm.auto import tqdm
    else:  # auto would warn in a notebook without widgets
        from tqdm import tqdm  # here, as the server's container lacks it
    settings = {"disable": not (in_notebook or sys.stderr.isatty()), "leave": False, "delay": DELAY}
    return tqdm(items, what, total, **settings | options)


def by_image(
    progress: Progress, batches: Iterable[Any], description: str, images: int, cached: int = 0
) -> Iterator[Any]:
    """The batches (inputs, ...) of the images that are not cached; the progress bar counts all `images`."""
    counted = iter(progress(range(images), description, images))
    deque(islice(counted, 1 + cached), 0)  # the first starts the bar at 0
    for batch in batches:
        yield batch
        deque(islice(counted, len(batch[0])), 0)
