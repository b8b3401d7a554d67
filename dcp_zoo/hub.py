"""Heads and CLIP weights from the Hugging Face Hub: requests, and a message for each error. The Hub's client
caches files, locks between processes, shows progress, and reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import get_session

from dcp_zoo.errors import UNREADABLE, ZooError, as_zoo_error
from dcp_zoo.fields import Values, mismatch
from dcp_zoo.files import read_plain, sha256_of

# everything the client raises; its HTTP error derives from the HTTP library it uses
HTTP_ERRORS = errors.HfHubHTTPError.__bases__
Kinds = tuple[type[Exception], ...]
CLIENT_ERRORS: Kinds = (
    *HTTP_ERRORS,
    errors.EntryNotFoundError,
    errors.HFValidationError,
    OSError,
    errors.XetDownloadError,
)
RAISED: Kinds = (*CLIENT_ERRORS, RuntimeError)  # which wraps what fails while a large file is uploaded

NOT_WRITABLE = "not writable"
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
MESSAGES: dict[object, str] = {
    NOT_WRITABLE: "The Hub cache is full or not writable ({error}). Set HF_HOME to another folder, or pass cache_dir.",
    # the first class that matches an error is used: specific ones before general ones
    errors.GatedRepoError: f"{{repo}} is gated: request access at {{hub}}/{{repo}}, then {LOGIN}.",
    errors.RepositoryNotFoundError: f"{{hub}} has no repo {{repo}}, or it is private. Check its name, or {LOGIN}.",
    errors.RevisionNotFoundError: "{repo} has no revision {revision!r}. Omit it for the newest, or see {hub}/{repo}.",
    errors.LocalEntryNotFoundError: "{file} of {repo} is not in the local cache, and {silence} "
    "A head on disk is local-dir:PATH.",
    errors.EntryNotFoundError: "{repo} has no file {file}: it is no such checkpoint. Check the repo and revision.",
    errors.HFValidationError: "{repo!r} is not a Hub repo id ({error}). Use ORG/NAME: hf-hub:ORG/NAME[@REVISION].",
    Exception: "{repo} cannot be had: {silence}",
}


# the folder where they are kept; None: the client's cache
DOWNLOADS = ContextVar[str | None]("DOWNLOADS", default=None)


@contextmanager
def downloads_in(folder: str | Path | None) -> Iterator[None]:
    """A context in which downloads are kept in this folder, by default in the client's cache."""
    token = DOWNLOADS.set(None if folder is None else str(folder))
    try:
        yield
    finally:
        DOWNLOADS.reset(token)


@contextmanager
def explained(repo_id: str, filename: str = "", revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into one ZooError that names the cause and what you can do."""
    try:
        yield
    except RAISED as raised:
        error = raised.__cause__ if type(raised) is RuntimeError else raised
        if not isinstance(error, CLIENT_ERRORS):
            raise
        message = MESSAGES[_kind(error)].format(
            repo=repo_id,
            file=filename,
            revision=revision,
            hub=constants.ENDPOINT,
            error=error,
            silence=silence(error),
        )
        raise ZooError(message) from error


def _kind(error: Exception) -> object:
    """The key of the message for an error, in `MESSAGES`. To those who are not logged in the Hub answers 401 for
    a repo that is private and for one that does not exist; the client takes any 401 so, also that of a
    proxy."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS):
        return NOT_WRITABLE
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", {})
    is_hubs = "X-Error-Message" in headers or headers.get("X-Error-Code") in ("RepoNotFound", "GatedRepo")
    if response is not None and response.status_code in (401, 403) and not is_hubs:
        return Exception
    return next(kind for kind in MESSAGES if isinstance(kind, type) and isinstance(error, kind))


def is_absent(error: ZooError) -> bool:
    """Whether the Hub has answered that there is no such repo, or none that may be seen."""
    cause = error.__cause__
    return isinstance(cause, CLIENT_ERRORS) and _kind(cause) is errors.RepositoryNotFoundError


def silence(error: Exception) -> str:
    """Why the Hub did not answer, and what to do."""
    if isinstance(error.__cause__, CLIENT_ERRORS):
        error = error.__cause__
    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"the error {status}" if status else f"{type(error).__name__}: {error}".rstrip(": ")
    return (
        f"{hub}, or a proxy before it, does not answer as a Hub does ({reason}). Check the network, HF_ENDPOINT, "
        "HF_TOKEN and its rights to write, and the proxy, or try again later."
    )


CLIP_WEIGHTS_NAME = "open_clip_model.safetensors"
CLIP_WEIGHTS_NAMES = (CLIP_WEIGHTS_NAME, "open_clip_pytorch_model.bin")
INDEX_REPO = "dcp-zoo-index"  # of an organisation
INDEX_NAME = "heads.json"
INDEX_SECONDS = 3  # the longest wait for the index
HUB_LIBRARY = "dcp-zoo"  # as the Hub knows this package: in cards, and in requests, which it counts


def download_head(repo_id: str, revision: str | None = None, sha256: str | None = None) -> Path:
    """The folder of a checkpoint in a Hub repo (at a branch, tag or commit, by default the newest) in the
    cache, downloaded if missing. ZooError if the download failed, or model.safetensors has another
    `sha256`."""
    config = download_file(repo_id, constants.CONFIG_NAME, revision)
    # the folder is named after the commit: the second file must come from the same one
    weights = download_file(repo_id, constants.SAFETENSORS_SINGLE_FILE, config.parent.name)
    if sha256 is not None and sha256_of(weights) != sha256:
        raise ZooError(
            f"{weights} is rejected: its sha256 is not {sha256}, which is pinned. Delete {weights.resolve()} and try "
            "again; if it is still wrong, do not use it."
        )
    return weights.parent


def origin(file: Path) -> str:
    """Where a file is from, to be logged: "FILE of ORG/NAME at COMMIT" for one in the Hub's cache, else its
    path."""
    commit, snapshots, repo = file.absolute().parents[:3]
    if snapshots.name != "snapshots":
        return str(file)
    return f"{file.name} of {repo.name.removeprefix('models--').replace('--', '/')} at {commit.name}"


def download_file(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """A file of a Hub repo at a revision, by default the newest, in the cache. ZooError as of `explained`."""
    cache_dir = DOWNLOADS.get()
    with explained(repo_id, filename, revision):
        known = try_to_load_from_cache(repo_id, filename, cache_dir, revision)
        if not isinstance(known, str):
            check_connection(constants.ENDPOINT)
        path = hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir, library_name=HUB_LIBRARY)
    return Path(path)


def read_index(org: str) -> tuple[Values, str]:
    """The rows of an organisation's index of heads, by name, which is fetched once in a process, and why there
    may be others, or "": the Hub does not answer, and this is the index fetched last, or it is damaged."""
    repo = f"{org}/{INDEX_REPO}"
    cache_dir = constants.HF_HUB_CACHE
    path: object = None
    problem = ""
    try:
        path = try_to_load_from_cache(repo, INDEX_NAME, cache_dir)
        path = _fetch_index(repo, constants.ENDPOINT, cache_dir)
    except CLIENT_ERRORS as error:
        problem = silence(error)
    if not isinstance(path, str):
        return {}, problem
    try:
        return dict(json.loads(Path(path).read_bytes())), problem
    except (ValueError, TypeError) as error:
        return {}, f"the index of {org} is damaged ({error})."


@cache
def _fetch_index(repo: str, endpoint: str, cache_dir: str) -> str | None:
    """The file of the index; None if the Hub has none. One of the client's errors, which is not remembered,
    if the Hub does not answer."""
    try:
        check_connection(endpoint, INDEX_SECONDS)
        # where there is no answer, the client of itself takes the file in its cache, without a word
        if (
            get_hf_file_metadata(hf_hub_url(repo, INDEX_NAME, endpoint=endpoint), timeout=INDEX_SECONDS).commit_hash
            is None
        ):
            raise errors.FileMetadataError(endpoint)
        return hf_hub_download(repo, INDEX_NAME, cache_dir=cache_dir, etag_timeout=INDEX_SECONDS, endpoint=endpoint)
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        if _kind(error) in (Exception, errors.LocalEntryNotFoundError):
            raise
        return None


forget_index = _fetch_index.cache_clear  # after it was changed


class FoundHead(NamedTuple):
    """A head that the Hub's search finds, as its owner describes it: nothing of this was checked."""

    owner: str  # an organisation or user
    head: str  # the name of its repo
    dataset: str  # "" if its card names none
    top1: float | None  # in percent, as its card claims; None if it claims none
    commit: str  # the newest

    @property
    def name(self) -> str:
        """By which `create_model` loads exactly this commit."""
        return f"hf-hub:{self.owner}/{self.head}@{self.commit}"


def search_heads() -> list[FoundHead]:
    """The heads of all owners whose cards name this package, by the Hub's search; no file of theirs is
    downloaded. ZooError if the Hub does not answer."""
    found = []
    try:
        check_connection(constants.ENDPOINT)
        for info in HfApi(library_name=HUB_LIBRARY).list_models(filter=HUB_LIBRARY, full=True, cardData=True):
            owner, _, head = info.id.rpartition("/")
            datasets = [tag.removeprefix("dataset:") for tag in info.tags or [] if tag.startswith("dataset:")]
            results = (info.card_data and info.card_data.eval_results) or []
            # a card begins with the accuracy of the head as it is loaded
            claims = (result.metric_value for result in results if not mismatch(result.metric_value, float))
            found.append(FoundHead(owner, head, ", ".join(datasets), next(claims, None), str(info.sha)))
    except CLIENT_ERRORS + UNREADABLE as error:
        raise ZooError(f"The Hub cannot be searched for heads: {silence(error)}") from error
    return found


@cache
def check_connection(endpoint: str, seconds: float = constants.HF_HUB_ETAG_TIMEOUT) -> None:
    """Raise the client's LocalEntryNotFoundError if the Hub does not answer. The client itself would retry
    for 24 s, and older ones for each request."""
    try:
        get_session().head(endpoint, timeout=seconds)
    except CLIENT_ERRORS as error:
        raise errors.LocalEntryNotFoundError(f"{endpoint} does not answer: {error}") from error


def fetch_clip(place: str, revision: str | None = None) -> Path:
    """The file with CLIP's weights, downloaded if missing: at "org/repo/file", or at "org/repo/" as
    safetensors or else pickled; open_clip would hide reasons of failures. In a folder called like its
    commit: that of the newest, if the repo has no such `revision`, or if that is not in the cache and the
    Hub does not answer."""
    repo_id, _, filename = place.rpartition("/")
    names = [filename] if filename else CLIP_WEIGHTS_NAMES
    commits = [revision, None] if revision else [None]
    tries = list(product(commits, names))
    for commit, name in tries:
        try:
            return download_file(repo_id, name, commit)
        except ZooError as error:
            problem = error
            if isinstance(error.__cause__, errors.LocalEntryNotFoundError):  # the Hub does not answer
                for commit, name in tries:
                    path = try_to_load_from_cache(repo_id, name, DOWNLOADS.get(), commit)
                    if isinstance(path, str):
                        return Path(path)
                raise
            if not isinstance(error.__cause__, (errors.EntryNotFoundError, errors.RevisionNotFoundError)):
                raise
    raise problem  # of the newest commit


def clip_config(clip: str) -> tuple[Values, Values]:
    """How "hf-hub:ORG/REPO" or "local-dir:FOLDER" describes its CLIP in open_clip's format: where the
    weights are and their preprocessing, and the sizes of the towers."""
    kind, _, place = clip.partition(":")
    name = "open_clip_config.json"
    path = download_file(place, name) if kind == "hf-hub" else Path(place) / name
    with as_zoo_error(f"{path} of {clip} is missing, damaged, or not open_clip's description of a CLIP ({{}})."):
        config = json.loads(read_plain(path))
        weights = dict(config.get("preprocess_cfg", {}))
        if kind == "hf-hub":
            weights["hf_hub"] = f"{place}/"
        else:
            weights["file"] = str(path.with_name(CLIP_WEIGHTS_NAME))
        return weights, dict(config["model_cfg"])
