"""The models behind the page, shared by all visitors and used by one at a time."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.names import repeated_names
from dcp_zoo.training.loop import pick_device
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import MODELS, Head, all_heads

_lock = threading.Lock()


def head_choices(model: str) -> list[tuple[str, str]]:
    """(label, name) of a model's heads for a menu, trained ones before planned ones."""
    heads = sorted((h for h in all_heads().values() if h.model == model), key=lambda head: head.status == "planned")
    return [(f"{head.tag} ({head.status})", head.name) for head in heads]


def describe(head: str, classes: int) -> str:
    """One sentence on a head: its status, classes and accuracy."""
    entry = all_heads().get(head)
    if entry is None:
        return f"{classes} classes; not in the registry, so its accuracy is unknown here."
    top1 = entry.metrics.get("top1_calibrated")
    measured = f"; top-1 on the test images of {entry.dataset}: {top1:.1f} %" if top1 is not None else ""
    return f"{entry.status}, {classes} classes, {entry.shots} training images per class{measured}."


@lru_cache(maxsize=2)
def load(head: str) -> DCP:
    """A head that all visitors may use, on the best device. Planned heads are rejected before any download."""
    entry = all_heads().get(head, Head(head))
    if head in all_heads() and entry.status == "planned":
        raise ZooError(
            f"{head} is planned: it has not been trained yet. Train it with `{entry.train_command}`, then show it here "
            f"with `dcp-zoo demo --head {head}`."
        )
    return create_model(head, True).eval().to(pick_device())


@contextmanager
def acquire(head: str | DCP, classnames: Sequence[str] | None = None) -> Iterator[DCP]:
    """A model with exclusive access inside the context; its classes and context are restored at the end.

    Args:
        head: a name, or a visitor's own model.
        classnames: the classes inside the context. Default: the head's.

    Raises:
        ZooError: a head that cannot be loaded, or invalid class names.
    """
    with _lock:
        model = load(head) if isinstance(head, str) else head
        original = model.classnames
        try:
            if classnames is not None and list(classnames) != original:
                if problem := repeated_names(classnames):
                    raise ZooError(problem)
                model.set_classnames(classnames)
            yield model
        finally:
            model.context = None
            if model.classnames is not original:
                model.set_classnames(original)


def model_names() -> list[str]:
    return list(MODELS)
