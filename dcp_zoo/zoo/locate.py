"""From the name of a head to its checkpoint folder, without torch."""

import warnings
from hashlib import sha256
from pathlib import Path

from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of
from dcp_zoo.model.config import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.model.config_file import checkpoint_folder, is_checkpoint
from dcp_zoo.zoo.registry import Head, get_head, get_spec, is_model


def head_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """The folder of a head's checkpoint, downloaded if it is on the Hub and not in the cache.

    Args:
        name: a head, a model (for its default head), the path of a checkpoint, "hf-hub:org/repo[@revision]" or
            "local-dir:path".
        cache_dir: where downloads are kept. Default: the Hub client's cache.

    Raises:
        ZooError: an unknown name, or a download that failed.
    """
    kind, colon, place = name.partition(":")
    if colon and kind == "local-dir":
        return checkpoint_folder(place)
    if colon and kind == "hf-hub":
        from dcp_zoo.zoo.hub import download_head  # slow to import

        repo_id, _, revision = place.partition("@")
        return download_head(repo_id, revision or None, cache_dir=cache_dir)
    if colon:
        raise ZooError(
            f"Unknown source {kind!r} in {name!r}: use hf-hub:org/repo[@revision], local-dir:path, "
            "or open_clip:ARCH/TAG."
        )
    if not is_model(name) and is_checkpoint(name):
        return checkpoint_folder(name)
    model, _, tag = name.partition(".")
    head = get_head(f"{model}.{tag or get_spec(model).default_tag}")
    return head.bundled_dir if head.status == "bundled" else download_registered(head, cache_dir)


def head_sha256(folder: Path) -> str:
    """A hash of a checkpoint's two files; ZooError if one is missing."""
    files = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    for file in files:
        if not file.is_file():
            raise ZooError(f"{folder} is not a checkpoint: it has no {file.name}. Pass a folder written by training.")
    return sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def download_registered(head: Head, cache_dir: str | Path | None = None) -> Path:
    """`download_head` for a head of the registry, at its pinned revision, or unpinned with a warning.

    Raises:
        ZooError: the download failed; for a head without a pin, the message lists what you can do.
    """
    from dcp_zoo.zoo.hub import download_head  # slow to import

    revision, sha256 = head.pin
    if revision is not None:
        return download_head(head.repo_id, revision, sha256, cache_dir)
    warnings.warn(
        f"{head.name} is not pinned in this version of dcp_zoo: using the newest revision of {head.repo_id} on the "
        "Hub.",
        stacklevel=5,  # the caller of create_model
    )
    try:
        return download_head(head.repo_id, cache_dir=cache_dir)
    except ZooError as error:
        known = f"was published in {head.org}" if head.status == "published" else "had not been published"
        raise ZooError(
            f"{head.name} is not available: {error}\n"
            f"It {known} when this version of dcp_zoo was released. What you can do:\n"
            f"- train it: {head.train_command}\n"
            "- if another organisation has it, set DCP_ZOO_HUB_ORG, or name it: hf-hub:ORG/REPO\n"
            "- if it is on a mirror, set HF_ENDPOINT; if it is on disk, name it: local-dir:PATH\n"
            "- start from CLIP's weights and fresh prompts: pretrained='clip'"
        ) from error
