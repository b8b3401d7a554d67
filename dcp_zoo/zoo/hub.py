"""Heads and CLIP weights from the Hugging Face Hub.

The Hub's own client caches, locks between processes, shows progress and reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN.
Here is what the zoo asks it for, the check of a pinned hash, and one message for each way in which it can fail.
"""

import errno
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, hf_hub_download
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
from dcp_zoo.model.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.zoo.registry import Head

CLIP_WEIGHTS_NAME = "open_clip_model.safetensors"
# everything that the client raises; the base of its HTTP error is that of the HTTP library it uses
CLIENT_ERRORS: tuple[type[Any], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    HFValidationError,
    OSError,
    getattr(errors, "XetDownloadError", OSError),  # older clients do not have it
)


def download_head(
    repo_id: str,
    revision: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of a Hub repo's checkpoint in the client's cache, downloaded if it is not there.

    Args:
        repo_id: such as "dcp-zoo/dcp_vitb16.imagenet-16shot".
        revision: branch, tag or commit. Default: the newest of the main branch.
        sha256: expected hash of model.safetensors. It is checked on cached files too.
        cache_dir: default: the client's own, which HF_HOME moves.

    Raises:
        ZooError: the download failed, or the file is not the pinned one.
    """
    config = download_file(repo_id, CONFIG_NAME, revision, cache_dir)
    # the folder is named after the commit: the second file must come from the same one
    weights = download_file(repo_id, WEIGHTS_NAME, config.parent.name, cache_dir)
    if sha256 is not None:
        check_sha256(weights, sha256)
    return weights.parent


def download_file(repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """One file of a Hub repo in the client's cache."""
    with explained(repo_id, filename, revision):
        path = hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            library_name="dcp_zoo",
            library_version=version("dcp_zoo"),
        )
    return Path(path)


def download_registered(head: Head, cache_dir: str | Path | None = None) -> Path:
    """`download_head` for a head of the registry, at its pinned revision, or unpinned with a warning.

    Raises:
        ZooError: the download failed; if nobody is known to have published the head, with the other ways to it.
    """
    revision, sha256 = head.pin
    if revision is not None:
        return download_head(head.repo_id, revision, sha256, cache_dir)
    warnings.warn(
        f"{head.name} is not pinned in this version of dcp_zoo: the newest revision of {head.repo_id} is taken, as the "
        "Hub has it now.",
        stacklevel=4,  # the caller of create_model
    )
    try:
        return download_head(head.repo_id, cache_dir=cache_dir)
    except ZooError as error:
        known = f"it was in {head.org}" if head.status == "published" else "nobody had published it"
        raise ZooError(
            f"{head.name} is not to be had: {error}\n"
            f"When this version of dcp_zoo was released {known}. Ways on:\n"
            f"- train it: {head.train_command}\n"
            "- if it is in another organisation, set DCP_ZOO_HUB_ORG, or name it: hf-hub:ORG/REPO\n"
            "- if it is on a mirror, set HF_ENDPOINT; if it is on disk: local-dir:PATH\n"
            "- start from CLIP's weights and fresh prompts: pretrained='clip'"
        ) from error


def fetch_clip(place: str, cache_dir: str | Path | None = None) -> None:
    """Bring CLIP's weights into the client's cache, where open_clip finds them.

    open_clip would download them too, and hide why it could not.

    Args:
        place: "org/repo/" or "org/repo/file", as open_clip's table has it.
        cache_dir: see `download_head`.
    """
    repo_id, _, filename = place.rpartition("/")
    try:
        download_file(repo_id, filename or CLIP_WEIGHTS_NAME, None, cache_dir)
    except ZooError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError) or not isinstance(error.__cause__, EntryNotFoundError):
            raise  # but a repo that has a file of another name is for open_clip


def check_sha256(path: Path, expected: str) -> None:
    """Raise ZooError unless the file has this hash."""
    found = sha256_of(path)
    if found != expected:
        raise ZooError(
            f"{path} is refused: its sha256 is {found}, and {expected} is pinned. The download or the disk damaged it, "
            f"or somebody changed it. Delete {path.resolve()} and try again; if it stays wrong, do not use it."
        )


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------ what went wrong

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
