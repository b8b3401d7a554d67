"""Heads and CLIP weights from the Hugging Face Hub: requests, and a message for each error. The Hub's
client caches, locks between processes, shows progress and reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN."""

import errno
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import get_session

from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.fields import Values
from dcp_zoo.files import read_plain, sha256_of

# everything the client raises; its HTTP error derives from the HTTP library it uses
HTTP_ERRORS, XET = errors.HfHubHTTPError.__bases__, getattr(errors, "XetDownloadError", OSError)  # not in older clients
Kinds = tuple[type[Exception], ...]
CLIENT_ERRORS: Kinds = (*HTTP_ERRORS, errors.EntryNotFoundError, errors.HFValidationError, OSError, XET)
RAISED: Kinds = (*CLIENT_ERRORS, RuntimeError)  # which wraps what fails while a large file is uploaded

NOT_WRITABLE, FORBIDDEN, NO_NETWORK = "not writable", "forbidden", "no network"
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
BY_HAND = "Or run `hf download {files}` elsewhere, and copy the folder {folder} from its Hub cache to {cache}."
MESSAGES: dict[object, str] = {
    NOT_WRITABLE: "The Hub cache is full or not writable ({error}). Set HF_HOME to another folder, or pass cache_dir.",
    FORBIDDEN: f"{{hub}} denies access to {{repo}}: {LOGIN}, using a token with write access.",
    NO_NETWORK: "{hub} cannot be reached for {repo}: {error}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE.",
    # the first class that matches an error is used: specific ones before general ones
    errors.GatedRepoError: f"{{repo}} is gated: request access at {{hub}}/{{repo}}, then {LOGIN}.",
    errors.RepositoryNotFoundError: f"{{hub}} has no repo {{repo}}, or it is private. Check its name, or {LOGIN}.",
    errors.RevisionNotFoundError: "{repo} has no revision {revision!r}. Omit it for the newest, or see {hub}/{repo}.",
    errors.LocalEntryNotFoundError: "{file} of {repo} is not in the local cache, and {hub} cannot be reached{why}, or "
    f"HF_HUB_OFFLINE forbids it. Check the network, or HF_ENDPOINT, or the proxy. {BY_HAND} A head on disk is "
    "local-dir:PATH.",
    errors.EntryNotFoundError: "{repo} has no file {file}: it is no such checkpoint. Check the repo and revision.",
    errors.HFValidationError: "{repo!r} is not a Hub repo id ({error}). Use ORG/NAME: hf-hub:ORG/NAME[@REVISION].",
    Exception: "{repo} at {hub}: {error}. Try again, or set HF_ENDPOINT to a mirror.",
}


@contextmanager
def explained(
    repo_id: str, filename: str = "", revision: str | None = None, cache_dir: str | Path | None = None
) -> Iterator[None]:
    """Turn the client's errors into one ZooError that names the cause and what you can do."""
    try:
        yield
    except RAISED as raised:
        error = raised.__cause__ if type(raised) is RuntimeError else raised
        if not isinstance(error, CLIENT_ERRORS):
            raise
        fields = {"repo": repo_id, "file": filename, "revision": revision, "hub": constants.ENDPOINT, "error": error}
        fields["why"] = f" ({error.__cause__})" if isinstance(error.__cause__, HTTP_ERRORS) else ""
        # the repo of a CLIP has its weights in other formats, too
        files = f"{repo_id} {filename}" if filename == CLIP_WEIGHTS_NAME else repo_id
        fields["files"] = f"{files} --revision {revision}" if revision else files
        folder, cache = f"models--{repo_id.replace('/', '--')}", cache_dir or constants.HF_HUB_CACHE
        raise ZooError(MESSAGES[_kind(error)].format(**fields, folder=folder, cache=cache)) from error


def is_offline(error: BaseException | None) -> bool:
    """Whether this machine has no network, or must not use it: an unknown host is an error below the client's own."""
    while error is not None and not isinstance(error, (socket.gaierror, errors.OfflineModeIsEnabled)):
        error = error.__cause__ or error.__context__
    return error is not None


def _kind(error: Exception) -> object:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS):
        return NOT_WRITABLE
    if type(error) is errors.HfHubHTTPError and error.response.status_code in (401, 403):
        return FORBIDDEN
    if not isinstance(error, errors.LocalEntryNotFoundError) and is_offline(error):
        return NO_NETWORK
    return next(kind for kind in MESSAGES if isinstance(kind, type) and isinstance(error, kind))


def is_absent(error: ZooError) -> bool:
    """Whether a repo is not on the Hub, as far as can be seen: where there is no network, it is not in the cache."""
    cause, absent = error.__cause__, (errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError)
    return isinstance(cause, CLIENT_ERRORS) and _kind(cause) in (*absent, NO_NETWORK)


CLIP_WEIGHTS_NAME = "open_clip_model.safetensors"
CLIP_WEIGHTS_NAMES = (CLIP_WEIGHTS_NAME, "open_clip_pytorch_model.bin")
INDEX_REPO, INDEX_NAME = "dcp-zoo-index", "heads.json"  # of an organisation's heads
INDEX_SECONDS = 3
HUB_LIBRARY = "dcp-zoo"  # as the Hub knows this package: in cards, and in requests, which it counts


def download_head(
    repo_id: str, revision: str | None = None, sha256: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The folder of a checkpoint in a Hub repo (at a branch, tag or commit, by default the newest) in the client's
    cache, downloaded if missing. ZooError if the download failed, or model.safetensors has another `sha256`."""
    config = download_file(repo_id, constants.CONFIG_NAME, revision, cache_dir)
    # the folder is named after the commit: the second file must come from the same one
    weights = download_file(repo_id, constants.SAFETENSORS_SINGLE_FILE, config.parent.name, cache_dir)
    if sha256 not in (None, actual := sha256_of(weights)):
        problem = f"{weights} is rejected: its sha256 is {actual}, but {sha256} is pinned."
        raise ZooError(f"{problem} Delete {weights.resolve()} and try again; if it is still wrong, do not use it.")
    return weights.parent


def download_file(repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    with explained(repo_id, filename, revision, cache_dir):
        known = try_to_load_from_cache(repo_id, filename, cache_dir, revision)
        if not isinstance(known, str) and not constants.HF_HUB_OFFLINE:
            check_connection(constants.ENDPOINT)
        asks: Values = {"library_name": HUB_LIBRARY, "library_version": version("dcp_zoo")}
        path = hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir, **asks)
    return Path(path)


def read_index(org: str) -> bytes:
    """The JSON of an organisation's index of heads, asked for once in a process; else the cached one, or "{}"."""
    repo, cache_dir, offline = f"{org}/{INDEX_REPO}", constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
    path = None if offline else _fetch_index(repo, constants.ENDPOINT, cache_dir)
    path = path or try_to_load_from_cache(repo, INDEX_NAME, cache_dir)
    return Path(path).read_bytes() if isinstance(path, str) else b"{}"


@cache
def _fetch_index(repo: str, endpoint: str, cache_dir: str) -> str | None:
    with suppress(*CLIENT_ERRORS):
        check_connection(endpoint, INDEX_SECONDS)
        return hf_hub_download(repo, INDEX_NAME, cache_dir=cache_dir, etag_timeout=INDEX_SECONDS)
    return None


forget_index = _fetch_index.cache_clear  # after it was changed


@cache
def check_connection(endpoint: str, seconds: float = constants.HF_HUB_ETAG_TIMEOUT) -> None:
    """Raise the client's LocalEntryNotFoundError if the Hub does not answer. The client itself would retry for 24 s."""
    try:
        get_session().head(endpoint, timeout=seconds)
    except CLIENT_ERRORS as error:
        raise errors.LocalEntryNotFoundError(f"{endpoint} does not answer: {error}") from error


def fetch_clip(
    place: str, cache_dir: str | Path | None = None, revision: str | None = None, otherwise: str = ""
) -> Path:
    """The file with CLIP's weights, downloaded if missing: at "org/repo/file", or at "org/repo/" as safetensors or else
    pickled; open_clip would hide reasons of failures. `otherwise`: advice where the repo has lost the `revision`."""
    repo_id, _, filename = place.rpartition("/")
    problems = []
    for name in [filename] if filename else CLIP_WEIGHTS_NAMES:
        try:
            return download_file(repo_id, name, revision, cache_dir)
        except ZooError as error:
            if isinstance(error.__cause__, errors.RevisionNotFoundError):
                raise ZooError(
                    f"{repo_id} does not have the pinned revision {revision} any more. {otherwise}"
                ) from error
            if not isinstance(error.__cause__, errors.EntryNotFoundError):
                raise
            problems.append(error)
    raise problems[0]


def clip_config(clip: str, cache_dir: str | Path | None = None) -> tuple[Values, Values]:
    """How "hf-hub:ORG/REPO" or "local-dir:FOLDER" describes its CLIP in open_clip's format: where the weights are and
    their preprocessing, and the sizes of the towers."""
    kind, _, place = clip.partition(":")
    name, on_hub = "open_clip_config.json", kind == "hf-hub"
    path = download_file(place, name, None, cache_dir) if on_hub else Path(place) / name
    with as_zoo_error(f"{path} of {clip} is missing, damaged, or not open_clip's description of a CLIP ({{}})."):
        config = json.loads(read_plain(path))
        weights = {"hf_hub": f"{place}/"} if on_hub else {"file": str(path.with_name(CLIP_WEIGHTS_NAME))}
        return {**config.get("preprocess_cfg", {}), **weights}, dict(config["model_cfg"])
