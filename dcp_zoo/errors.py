"""The one exception for bad input, and helpers for its messages."""

import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any


class ZooError(ValueError):
    """Bad input: the message names the cause, the valid choices and the next step.

    The command line prints the message without a traceback.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught ZooError in "):  # torch's DataLoader adds its worker's traceback
            message = message.rpartition("ZooError: ")[2].rstrip()
        super().__init__(message)


def nearest(name: str, valid: Iterable[str], n: int = 5) -> list[str]:
    """Up to `n` entries of `valid` closest to `name`, best first."""
    return difflib.get_close_matches(name, list(valid), n=n, cutoff=0.4)


def check_choice(what: str, value: str, valid: Sequence[str]) -> None:
    """Raise ZooError, naming the valid choices, unless `value` is one of them."""
    if value not in valid:
        raise ZooError(f"Unknown {what} {value!r}: choose from {', '.join(valid)}.")


def import_extra(module: str, extra: str) -> Any:
    """Import a module; ZooError names the extra of the package that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ZooError(f"This needs {module.split('.')[0]} ({error}): pip install 'dcp_zoo[{extra}]'.") from error
