"""Heads from the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from .checkpoint import CONFIG_NAME, WEIGHTS_NAME


def download_head(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The local folder of a Hub repo's checkpoint, downloaded if it is not cached."""
    return Path(
        snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME])
    )
