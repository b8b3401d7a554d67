"""Heads and CLIP weights from the Hugging Face Hub.

The Hub's client caches, locks between processes, shows progress and reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN.
This module adds the zoo's requests, the check of a pinned hash, and one message for each kind of failure.
"""

import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of
from dcp_zoo.hub_errors import CLIENT_ERRORS, explained
from dcp_zoo.model.config import CONFIG_NAME, WEIGHTS_NAME

CLIP_WEIGHTS_NAME = "open_clip_model.safetensors"
HUB_LIBRARY = "dcp-zoo"  # as the Hub knows this package: in cards, and in requests, which it counts


def download_head(
    repo_id: str,
    revision: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of a Hub repo's checkpoint in the client's cache, downloaded if missing.

    Args:
        repo_id: such as "dcp-zoo/dcp_vitb16.imagenet-16shot".
        revision: branch, tag or commit. Default: the newest of the main branch.
        sha256: expected hash of model.safetensors, checked on cached files too.
        cache_dir: where to cache. Default: the client's cache, which HF_HOME moves.

    Raises:
        ZooError: the download failed, or the file is not the pinned one.
    """
    config = download_file(repo_id, CONFIG_NAME, revision, cache_dir)
    # the folder is named after the commit: the second file must come from the same one
    weights = download_file(repo_id, WEIGHTS_NAME, config.parent.name, cache_dir)
    if sha256 not in (None, found := sha256_of(weights)):
        raise ZooError(
            f"{weights} is rejected: its sha256 is {found}, but {sha256} is pinned. The file was damaged or changed. "
            f"Delete {weights.resolve()} and try again; if the hash is still wrong, do not use it."
        )
    return weights.parent


def download_file(repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """One file of a Hub repo in the client's cache."""
    with explained(repo_id, filename, revision):
        known = try_to_load_from_cache(repo_id, filename, cache_dir, revision)
        if not isinstance(known, str) and not constants.HF_HUB_OFFLINE:
            check_connection(constants.ENDPOINT)
        path = hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            library_name=HUB_LIBRARY,
            library_version=version("dcp_zoo"),
        )
    return Path(path)


@cache
def check_connection(endpoint: str) -> None:
    """Raise the client's LocalEntryNotFoundError if the Hub does not answer. The client itself would retry for 24 s."""
    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except CLIENT_ERRORS as error:
        raise LocalEntryNotFoundError(f"{endpoint} does not answer: {error}") from error


def fetch_clip(place: str, cache_dir: str | Path | None = None) -> None:
    """Download CLIP's weights into the client's cache, where open_clip finds them.

    open_clip would download them too, but hide the reason for a failure.

    Args:
        place: "org/repo/" or "org/repo/file", as in open_clip's table.
        cache_dir: see `download_head`.
    """
    repo_id, _, filename = place.rpartition("/")
    try:
        download_file(repo_id, filename or CLIP_WEIGHTS_NAME, None, cache_dir)
    except ZooError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError) or not isinstance(error.__cause__, EntryNotFoundError):
            raise  # open_clip handles a repo whose weights have another file name


def clip_repo_config(repo_id: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """open_clip's description of a CLIP in a Hub repo: the sizes of its towers, and its preprocessing.

    Raises:
        ZooError: the download failed, or the repo is not one of open_clip's.
    """
    path = download_file(repo_id, "open_clip_config.json", None, cache_dir)
    try:
        config = json.loads(path.read_text())
        return {"preprocess_cfg": {}, **config, "model_cfg": dict(config["model_cfg"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ZooError(
            f"{path} of {repo_id} is damaged, or not open_clip's description of a CLIP ({error})."
        ) from error
