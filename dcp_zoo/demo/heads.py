"""The models behind the page, shared by all visitors and acquire to one at a time."""

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
    """(label, name) of a model's heads for a menu, those that exist before the planned ones."""
    heads = sorted((h for h in all_heads().values() if h.model == model), key=lambda head: head.status == "planned")
    return [(f"{head.tag} ({head.status})", head.name) for head in heads]


def describe(head: str, classes: int) -> str:
    """One sentence on a head of the registry: its status, classes, and what was measured."""
    entry = all_heads().get(head)
    if entry is None:
        return f"{classes} classes; not in the registry, so nothing is known here of its accuracy."
    top1 = entry.metrics.get("top1_calibrated")
    measured = f"; top-1 on the test images of {entry.dataset}: {top1:.1f} %" if top1 is not None else ""
    return f"{entry.status}, {classes} classes, {entry.shots} training images per class{measured}."


@lru_cache(maxsize=2)
def load(head: str) -> DCP:
    """A head that everybody may see, on the best device. A planned one is refused before anything is looked for."""
    entry = all_heads().get(head, Head(head))
    if head in all_heads() and entry.status == "planned":
        raise ZooError(
            f"{head} is planned: nobody has trained it yet. Train it with `{entry.train_command}`, and see it here "
            f"with `dcp-zoo demo --head {head}`."
        )
    return create_model(head, True).eval().to(pick_device())


@contextmanager
def acquire(head: str | DCP, classnames: Sequence[str] | None = None) -> Iterator[DCP]:
    """A model, for the caller alone until the block ends; its classes and context are then as they were.

    Args:
        head: a name, or a visitor's own model.
        classnames: the classes meanwhile, default the head's own.

    Raises:
        ZooError: a head that cannot be loaded, class names that do not work.
    """
    with _lock:
        model = load(head) if isinstance(head, str) else head
        own = model.classnames
        try:
            if classnames is not None and list(classnames) != own:
                if problem := repeated_names(classnames):
                    raise ZooError(problem)
                model.set_classnames(classnames)
            yield model
        finally:
            model.context = None
            if model.classnames is not own:
                model.set_classnames(own)


def model_names() -> list[str]:
    return list(MODELS)
