"""The one exception that bad input raises, and the nearest valid names for its message."""

import difflib
from collections.abc import Iterable


class ZooError(ValueError):
    """Bad input: the message names the cause, the valid choices and the next step. The command line prints it alone."""


def nearest(name: str, valid: Iterable[str], n: int = 5) -> list[str]:
    """The up to `n` names of `valid` that look most like `name`, best first."""
    return difflib.get_close_matches(name, list(valid), n=n, cutoff=0.4)
