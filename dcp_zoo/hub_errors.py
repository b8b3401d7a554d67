"""What the Hugging Face Hub's client raises, as one message that names the cause and what you can do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

from dcp_zoo.errors import ZooError

# everything that the client raises; the base of its HTTP error is that of the HTTP library it uses
CLIENT_ERRORS: tuple[type[Any], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    HFValidationError,
    OSError,
    getattr(errors, "XetDownloadError", OSError),  # older clients do not have it
)

OFFLINE, NO_SPACE, FORBIDDEN = "offline", "no space", "forbidden"
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
MESSAGES: dict[Any, str] = {
    NO_SPACE: "Not enough disk space for {file} of {repo}. Make room, or move the cache with cache_dir=DIR or HF_HOME.",
    OFFLINE: "{file} of {repo} is not in the local cache, and HF_HUB_OFFLINE forbids to download it. Unset it, copy "
    "the cache of a machine that has it, or name a checkpoint on disk: local-dir:PATH.",
    FORBIDDEN: f"{{hub}} does not let you do this with {{repo}}: {LOGIN}, with a token that may write there.",
    # the first kind that fits an error is taken: special ones above general ones
    GatedRepoError: f"{{repo}} is gated: ask for access at {{hub}}/{{repo}}, then {LOGIN}.",
    RepositoryNotFoundError: "{hub} has no repo {repo}, or it is private. Check name and revision; for another Hub "
    f"or a mirror, set HF_ENDPOINT; for a private repo, {LOGIN}.",
    RevisionNotFoundError: "{repo} has no revision {revision!r}. Leave it out for the newest, or see {hub}/{repo}.",
    LocalEntryNotFoundError: "{hub} cannot be reached, and {file} of {repo} is not in the local cache. Check the "
    "network; where there is none, set HF_HUB_OFFLINE=1 to be told at once; for a mirror, set HF_ENDPOINT; for a "
    "checkpoint on disk, name it: local-dir:PATH.",
    EntryNotFoundError: "{repo} has no file {file}: not a checkpoint of this kind. Check the repo and the revision.",
    HFValidationError: "{repo!r} is not a Hub repo id ({error}). Write ORG/NAME, as in hf-hub:ORG/NAME[@REVISION].",
    Exception: "{repo} at {hub}: {error}. Try again, or set HF_ENDPOINT to a mirror.",
}


@contextmanager
def explained(repo_id: str, filename: str = "", revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one ZooError that names the cause and the ways on."""
    try:
        yield
    except CLIENT_ERRORS as error:
        facts = {"repo": repo_id, "file": filename, "revision": revision, "hub": constants.ENDPOINT, "error": error}
        raise ZooError(MESSAGES[_kind(error)].format(**facts)) from error


def _kind(error: Exception) -> Any:
    if getattr(error, "errno", None) == errno.ENOSPC:
        return NO_SPACE
    if type(error) is HfHubHTTPError and error.response.status_code in (401, 403):
        return FORBIDDEN
    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError):
        return OFFLINE
    return next(kind for kind in MESSAGES if isinstance(kind, type) and isinstance(error, kind))
