"""Errors of the Hugging Face Hub client: which are worth another attempt, and one message each for the others."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import constants, errors
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dcp_zoo.errors import NOT_WRITABLE, ZooError

# everything the client raises; its HTTP error derives from the HTTP library it uses
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    HFValidationError,
    OSError,
    getattr(errors, "XetDownloadError", OSError),  # older clients do not have it
)
RAISED: tuple[type[Exception], ...] = (*CLIENT_ERRORS, RuntimeError)  # it also hides them behind a RuntimeError

WAITS = (2, 10, 30, 120)  # seconds before another attempt
PASSING = (408, 429, 500, 502, 503, 504)  # a rate limit, or a server in trouble
T = TypeVar("T")

OFFLINE, NO_SPACE, READ_ONLY, FORBIDDEN = "offline", "no space", "read-only", "forbidden"
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
MESSAGES: dict[Any, str] = {
    NO_SPACE: "Not enough disk space for {file} of {repo}. Free some, or move the cache with cache_dir=DIR or HF_HOME.",
    READ_ONLY: "The Hub cache is not writable ({error}). Set HF_HOME to a folder that is, or use a checkpoint on "
    "disk: local-dir:PATH.",
    OFFLINE: "{file} of {repo} is not in the local cache, and HF_HUB_OFFLINE forbids downloading it. Unset it, copy "
    "the cache from a machine that has the file, or use a checkpoint on disk: local-dir:PATH.",
    FORBIDDEN: f"{{hub}} denies access to {{repo}}: {LOGIN}, using a token with write access.",
    # the first class that matches an error is used: specific ones before general ones
    GatedRepoError: f"{{repo}} is gated: request access at {{hub}}/{{repo}}, then {LOGIN}.",
    RepositoryNotFoundError: "{hub} has no repo {repo}, or it is private. Check its name and revision. For another Hub "
    f"or a mirror, set HF_ENDPOINT; for a private repo, {LOGIN}.",
    RevisionNotFoundError: "{repo} has no revision {revision!r}. Omit it for the newest, or see {hub}/{repo}.",
    LocalEntryNotFoundError: "{hub} cannot be reached, and {file} of {repo} is not in the local cache. Check the "
    "network, set HF_ENDPOINT to use a mirror, or use a checkpoint on disk: local-dir:PATH. On a machine without a "
    "network, HF_HUB_OFFLINE=1 skips this request.",
    EntryNotFoundError: "{repo} has no file {file}: it is not a checkpoint of this kind. Check the repo and revision.",
    HFValidationError: "{repo!r} is not a Hub repo id ({error}). Use ORG/NAME, as in hf-hub:ORG/NAME[@REVISION].",
    Exception: "{repo} at {hub}: {error}. Try again, or set HF_ENDPOINT to a mirror.",
}


@contextmanager
def explained(repo_id: str, filename: str = "", revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into one ZooError that names the cause and what you can do."""
    try:
        yield
    except RAISED as raised:
        error = _cause(raised)
        if not isinstance(error, CLIENT_ERRORS):
            raise
        fields = {"repo": repo_id, "file": filename, "revision": revision, "hub": constants.ENDPOINT, "error": error}
        raise ZooError(MESSAGES[_kind(error)].format(**fields)) from error


def retried(call: Callable[[], T]) -> T:
    """The result of `call`, which is tried again after a pause if the Hub is busy or the connection was lost.

    Repeating an upload is safe: the client compares what the Hub has, and makes no commit without a change.
    """
    for wait in WAITS:
        try:
            return call()
        except RAISED as raised:
            error = _cause(raised)
            if not _may_pass(error):
                raise
            after = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
            time.sleep(max(wait, int(after) if after.isdecimal() else 0))
    return call()


def _cause(error: Exception) -> Exception:
    """The client wraps what fails while it uploads a large file in a RuntimeError."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and isinstance(cause, Exception) else error


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: a passing status, or no answer at all; an OSError of this machine has
    a number, where requests' errors have their cause."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in PASSING
    lost = isinstance(error, (OSError, *HfHubHTTPError.__bases__))
    return lost and not isinstance(getattr(error, "errno", None), int)


def _kind(error: Exception) -> Any:
    if getattr(error, "errno", None) == errno.ENOSPC:
        return NO_SPACE
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        return READ_ONLY
    if type(error) is HfHubHTTPError and error.response.status_code in (401, 403):
        return FORBIDDEN
    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError):
        return OFFLINE
    return next(kind for kind in MESSAGES if isinstance(kind, type) and isinstance(error, kind))
