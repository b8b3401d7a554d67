"""The one exception for bad input, the category of all warnings, and helpers for messages."""

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from textwrap import shorten as shorten_text
from typing import Any, TypeVar

T = TypeVar("T")
MUTED = ContextVar("MUTED", default=False)  # see `without_warnings`
PACKAGE = os.path.join(os.path.dirname(__file__), "")  # noqa: PTH118, PTH120  as frames have it
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RecursionError,
)  # of a file that is not what it should be


class ZooError(ValueError):
    """Bad input: the message names the cause, the valid choices and the next step."""

    def __init__(self, message: str = "") -> None:
        kind = type(self).__name__
        if message.startswith(f"Caught {kind} in "):  # torch's DataLoader adds its worker's traceback
            message = message.rpartition(f"{kind}: ")[2].rstrip()
        super().__init__(message)

    @property
    def reason(self) -> str:
        """The cause alone, without the name of the image or file; or the whole message."""
        return str(self.__cause__ or self) or "damaged"


class UnreadableImages(ZooError):
    """Images that cannot be read. `reasons` says why of each, by its path; of one in memory by its place
    among the images, such as "image 3", counted from 0."""

    def __init__(self, message: str = "", reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})


class ZooWarning(UserWarning):
    """Every warning of this package, so that one filter finds them."""


def attempted(function: Callable[..., T], *arguments: Any) -> T | ZooError:
    """What a function returns, or the ZooError that it raises, without a traceback, which would hold the
    arguments."""
    try:
        return function(*arguments)
    except ZooError as error:
        return error.with_traceback(None)


@contextmanager
def without_warnings() -> Iterator[None]:
    """A context without this package's warnings, where work is repeated of which they have been shown."""
    token = MUTED.set(True)
    try:
        yield
    finally:
        MUTED.reset(token)


def warn(text: str) -> None:
    """A warning at the line of the user's code that called this package, also through decorators."""
    if MUTED.get():
        return
    frame = sys._getframe(1)
    level = 2
    # the second are the standard library's and torch's, of context managers that decorate functions
    while frame.f_back and (
        frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename.endswith("contextlib.py")
    ):
        frame = frame.f_back
        level += 1
    warnings.warn(text, ZooWarning, stacklevel=level)


def shorten(names: Sequence[str], n: int = 10) -> str:
    """The first `n` names, and how many more there are."""
    text = ", ".join(names[:n])
    return f"{text} and {len(names) - n} more" if len(names) > n else text


def by_reason(reasons: Mapping[str, str]) -> str:
    """Names with the reason of each, such as "a.jpg, b.jpg (it is a video), c.jpg (truncated)"; ten of both
    at most."""
    names: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        names.setdefault(reason, []).append(name)
    return shorten([f"{shorten(alike)} ({reason})" for reason, alike in names.items()])


def nearest_hint(name: str, valid: Iterable[str]) -> str:
    """The part of an error message that suggests the nearest valid names, five at most, best first."""
    close = difflib.get_close_matches(name, list(valid), n=5, cutoff=0.4)
    return f" Nearest: {', '.join(close)}." if close else ""


def check_choice(what: str, value: object, valid: Sequence[object]) -> None:
    """Raise ZooError, naming the valid choices, unless `value` is one of them."""
    if value not in valid:
        choices = ", ".join(str(choice) for choice in valid if choice is not None)
        raise ZooError(f"Unknown {what} {value!r}: choose from {choices}.")


def beyond(value: float, least: float | None = None, most: float | None = None) -> str:
    """The limit that a value is outside of, in words; "" if it is not."""
    if least is not None and value < least:
        return f"at least {least}"
    if most is not None and value > most:
        return f"at most {most}"
    return ""


def check_range(what: str, value: float, least: float, most: float | None = None) -> None:
    """Raise ZooError, naming the limits, unless `value` is within them."""
    limits = beyond(value, least, most)
    if limits:
        raise ZooError(f"{what} must be {limits}, not {value}.")


@contextmanager
def as_zoo_error(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise errors of these kinds, by default `UNREADABLE`, as a ZooError with their text in place of {}."""
    kinds = kinds or UNREADABLE
    try:
        yield
    except ZooError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ZooError(message.replace("{}", shorten_text(reason, 500), 1)) from error


def writing_to(path: str | os.PathLike, otherwise: str = "choose another --output") -> AbstractContextManager[None]:
    """Raise OSError as a ZooError that says which file or folder is not writable, why, and what to do."""
    advice = otherwise and f" {otherwise[0].upper()}{otherwise[1:]}."
    return as_zoo_error(f"Cannot write to {path}: {{}}.{advice}", OSError)


def import_extra(module: str, extra: str) -> Any:
    """Import a module; ZooError names the extra of the package that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ZooError(f"This needs {module.split('.')[0]} ({error}): pip install 'dcp_zoo[{extra}]'.") from error
