"""The one exception that bad input raises, and what its messages are made of."""

import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any


class ZooError(ValueError):
    """Bad input: the message names the cause, the valid choices and the next step. The command line prints it alone."""

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught ZooError in "):  # by torch's DataLoader, which adds the traceback of its worker
            message = message.rpartition("ZooError: ")[2].rstrip()
        super().__init__(message)


def nearest(name: str, valid: Iterable[str], n: int = 5) -> list[str]:
    """The up to `n` names of `valid` that look most like `name`, best first."""
    return difflib.get_close_matches(name, list(valid), n=n, cutoff=0.4)


def check_choice(what: str, value: str, valid: Sequence[str]) -> None:
    """Raise ZooError, naming the valid choices, unless `value` is one of them."""
    if value not in valid:
        raise ZooError(f"Unknown {what} {value!r}: choose from {', '.join(valid)}.")


def import_extra(module: str, extra: str) -> Any:
    """The module, or a ZooError that says which of the package's extras brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ZooError(f"This needs {module.split('.')[0]} ({error}): pip install 'dcp_zoo[{extra}]'.") from error
