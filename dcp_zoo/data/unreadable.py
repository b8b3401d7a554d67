"""Images that cannot be read: all are named in one error, or left out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from dcp_zoo.data.images import ImageLike, check_complete, in_threads, load_image
from dcp_zoo.data.splits import PARTS, Item, Split
from dcp_zoo.errors import UnreadableImages, ZooError, attempted, by_reason, shorten, warn
from dcp_zoo.fields import Values
from dcp_zoo.progress import Progress, bar, no_progress

ERRORS = ("raise", "keep")  # for images that cannot be read
ADVICE = 'Replace them, or leave them out: in train by --skip-unreadable, in Python by errors="keep".'


def damaged(
    items: Sequence[Item],
    read: Callable[[ImageLike], object] = check_complete,
    progress: Progress = no_progress,
) -> dict[int, ZooError]:
    """The errors of the images that cannot be read, by position.

    Args:
        items: the images.
        read: what reads an image; by default only a file's header and last bytes, while `load_image`
            finds all damage.
        progress: shows the progress.
    """

    def problem(item: Item) -> ZooError | None:
        result = attempted(read, item.path)
        return result if isinstance(result, ZooError) else None  # images would fill the memory

    problems = progress(in_threads(problem, items), "Checking images", len(items))
    return {i: error for i, error in enumerate(problems) if error}


def refuse(items: Sequence[Item], errors: Mapping[int, ZooError]) -> None:
    """Raise one error for all images that cannot be read, if there are any, given their errors by
    position."""
    if not errors:
        return
    if len(items) == 1:
        raise errors[0]
    raise UnreadableImages(f"{unreadable_summary(items, errors)}. {ADVICE}", _reasons(items, errors))


def unreadable_summary(items: Sequence[Item], errors: Mapping[int, ZooError]) -> str:
    """How many images cannot be read, which and why."""
    return f"{len(errors)} of {len(items)} images cannot be read: {by_reason(_reasons(items, errors))}"


def _reasons(items: Sequence[Item], errors: Mapping[int, ZooError]) -> dict[str, str]:
    return {items[i].name: error.reason for i, error in errors.items()}


@contextmanager
def all_named(items: Sequence[Item]) -> Iterator[None]:
    """Inside this context, an error about one image that cannot be read becomes one about all such
    images."""
    try:
        yield
    except UnreadableImages:
        refuse(items, damaged(items, load_image))
        raise


def without_unreadable(split: Split, progress: Progress = bar) -> Split:
    """A split without images that cannot be decoded; a warning names them. ZooError for a class without
    others."""
    items = split.all_items
    errors = damaged(items, load_image, progress)
    if not errors:
        return split
    broken = {id(items[i]) for i in errors}
    left: Values = {}
    for part in (*PARTS, "no_class"):
        left[part] = [item for item in getattr(split, part) if id(item) not in broken]
    summary = unreadable_summary(items, errors)
    empty = {item.label for item in split.train} - {item.label for item in left["train"]}
    if empty:
        names = shorten([split.classnames[label] for label in sorted(empty)])
        raise ZooError(f"{summary}. {names} has no other image: add some, or remove the class.")
    warn(f"{summary}. Training goes on without them.")
    return replace(split, **left)
