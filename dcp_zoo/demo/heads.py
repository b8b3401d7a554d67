"""The models behind the page, shared by all visitors and used by one at a time."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from dcp_zoo.api.functions import as_model
from dcp_zoo.errors import ZooError
from dcp_zoo.model.names import repeated_names
from dcp_zoo.zoo.registry import all_heads

_lock = threading.Lock()


def head_note(head: str, classes: int) -> str:
    """A head's classes, training images and accuracy, in a sentence or two."""
    entry = all_heads().get(head)
    if entry is None:
        return f"{classes} classes."
    top1 = entry.metrics.get("top1_stored")
    measured = f" Top-1 on its test images: {top1:.1f}\u00a0%." if top1 is not None else ""
    return f"{classes} classes of {entry.dataset}, {entry.shots} training images per class.{measured}"


@lru_cache(maxsize=2)
def load(head: str) -> Any:
    """A head that all visitors may use, on the best device."""
    return as_model(head, "auto")


@contextmanager
def acquire(head: Any, classnames: Sequence[str] | None = None) -> Iterator[Any]:
    """A model with exclusive access inside the context: a copy that shares its weights, with its own classes and
    statistics.

    Args:
        head: a name, or a visitor's own model.
        classnames: the classes. Default: the head's.

    Raises:
        ZooError: a head that cannot be loaded, or invalid class names.
    """
    with _lock:
        shared = load(head) if isinstance(head, str) else head
        model = copy.copy(shared)
        for parts in ("_buffers", "_modules"):  # a module's copy would write into the module's own
            setattr(model, parts, dict(getattr(shared, parts)))
        if classnames is not None and list(classnames) != model.classnames:
            if problem := repeated_names(classnames):
                raise ZooError(problem)
            model.set_classnames(classnames)
        yield model
