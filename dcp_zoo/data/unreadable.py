"""Images that cannot be read: all are named in one error, or left out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.pool import ThreadPool

from dcp_zoo.data.images import ImageLike, Progress, bar, check_complete, load_image, no_progress
from dcp_zoo.data.splits import PARTS, Item, Split
from dcp_zoo.errors import UnreadableImages, ZooError, attempted, by_reason, shorten, warn
from dcp_zoo.fields import Values
from dcp_zoo.threads import available_cores

ERRORS = ("raise", "keep")  # for images that cannot be read
MOVE = "Replace them, or move them out of their class folders."
KEEP = 'Replace them, or pass errors="keep" to go on without them.'


def damaged(
    items: Sequence[Item],
    read: Callable[[ImageLike], object] = check_complete,
    progress: Progress = no_progress,
    name: str = "images",
) -> dict[int, ZooError]:
    """Why images cannot be read, by their positions: by default few bytes of a file tell; `load_image` finds all."""

    def problem(item: Item) -> ZooError | None:
        error = None if hasattr(item.path, "ndim") else attempted(read, item.path)  # features have no image
        return error if isinstance(error, ZooError) else None  # images would fill the memory

    with ThreadPool(available_cores()) as pool:  # PIL decodes outside the interpreter lock
        problems = enumerate(progress(pool.imap(problem, items, chunksize=64), f"Checking {name}", len(items)))
        return {i: error for i, error in problems if error}


def check_images(items: Sequence[Item], progress: Progress = bar, advice: str = MOVE) -> None:
    """Raise one `UnreadableImages` if `damaged` finds some; it then names all that cannot be decoded, too."""
    if damaged(items, progress=progress):
        refuse(items, damaged(items, load_image, progress), advice)


def refuse(items: Sequence[Item], errors: Mapping[int, ZooError], advice: str = KEEP) -> None:
    """Raise one `UnreadableImages` for the images that cannot be read, if there are any: why, by their positions."""
    if errors and len(items) == 1:
        raise errors[0]
    if errors:
        raise UnreadableImages(f"{told(items, errors)}. {advice}", _named(items, errors))


def told(items: Sequence[Item], errors: Mapping[int, ZooError]) -> str:
    """How many images cannot be read, which and why."""
    return f"{len(errors)} of {len(items)} images cannot be read: {by_reason(_named(items, errors))}"


def _named(items: Sequence[Item], errors: Mapping[int, ZooError]) -> dict[str, str]:
    return {items[i].name: error.reason for i, error in errors.items()}


@contextmanager
def all_named(items: Sequence[Item], advice: str = KEEP) -> Iterator[None]:
    """An error of one image, which `check_images` did not find, becomes one of all such images."""
    try:
        yield
    except UnreadableImages:
        refuse(items, damaged(items, load_image), advice)
        raise


def without_unreadable(split: Split, progress: Progress = bar) -> Split:
    """A split without images that cannot be decoded; a warning names them. ZooError for a class without others."""
    items = [*split.items, *split.none]
    if not (errors := damaged(items, load_image, progress)):
        return split
    gone = {id(items[i]) for i in errors}
    parts: Values = {part: [item for item in getattr(split, part) if id(item) not in gone] for part in (*PARTS, "none")}
    if empty := {item.label for item in split.train} - {item.label for item in parts["train"]}:
        names = shorten([split.classnames[label] for label in sorted(empty)])
        raise ZooError(f"{told(items, errors)}. {names} has no other image: add some, or remove the class.")
    warn(f"{told(items, errors)}. Training goes on without them.")
    return replace(split, unreadable=len(errors), **parts)
