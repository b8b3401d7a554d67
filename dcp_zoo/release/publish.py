"""Publish a trained head to the Hub, with its model card, and pin it in the manifest."""

import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from dcp_zoo.data.table import SHARD_SCHEME
from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of, write_file
from dcp_zoo.hub_errors import explained, retried
from dcp_zoo.model.config import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.model.dcp import DCP, load_head
from dcp_zoo.model.head import Head
from dcp_zoo.release.card import CARD_NAME, make_card, public_name
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.hub import HUB_LIBRARY
from dcp_zoo.zoo.registry import MANIFEST, HeadEntry, all_heads, get_head, trained_heads

LICENSE = "apache-2.0"
ANY_HEAD = "Upload other heads with dcp_zoo.push_to_hub(model, 'ORG/NAME')."


@dataclass(frozen=True)
class Release:
    """A checkpoint folder that has passed the checks for the Hub.

    Attributes:
        head: its entry in the registry.
        card: its model card.
        info: what the checkpoint stores about its training.
    """

    folder: Path
    head: HeadEntry
    repo_id: str
    sha256: str
    card: ModelCard
    info: dict[str, Any]
    license: str

    @property
    def metrics(self) -> dict[str, Any]:
        return self.info.get("metrics", {})

    def entry(self, revision: str) -> dict[str, Any]:
        """Its entry in the manifest, pinned to a revision; a bundled head stays bundled."""
        return {
            "status": "bundled" if self.head.status == "bundled" else "published",
            "org": self.repo_id.split("/")[0],
            "revision": revision,
            "sha256": self.sha256,
            "license": self.license,
            "metrics": self.metrics,
        }


def prepare(folder: str | Path, org: str, license: str = LICENSE) -> Release:
    """Check a checkpoint folder as strictly as loading does, and build its card in memory.

    Args:
        folder: written by training, for one of the registry's heads.
        org: organisation or user on the Hub.
        license: of the trained weights, as an identifier of the Hub.

    Raises:
        ZooError: not a valid checkpoint, or a head that is not in the registry.
    """
    folder = Path(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CLIP's weights are random: nothing is downloaded
        model = create_model(f"local-dir:{folder}", False)
    if model.method == "dcp":  # heads of other methods are loaded as they are built
        load_head(model, folder)
    head = entry_of(model, folder)
    repo_id, weights = f"{org}/{head.name}", folder / WEIGHTS_NAME
    card = make_card(model, repo_id, license, weights.stat().st_size)
    return Release(folder, head, repo_id, sha256_of(weights), card, model.info, license)


def entry_of(model: Head, folder: Path) -> HeadEntry:
    """The registry's entry for a checkpoint; ZooError if there is none."""
    if model.method != "dcp":
        raise ZooError(f"{folder} is a head of {model.method}: the zoo has heads of dcp only. {ANY_HEAD}")
    try:
        dataset, shots, seed = (model.info[name] for name in ("dataset", "shots", "seed"))
        return get_head(f"{model.architecture}.{dataset}-{shots}shot" + (f"-seed{seed}" if seed != 1 else ""))
    except (KeyError, ZooError) as error:
        raise ZooError(f"{folder} is not one of the zoo's heads, by dataset, shots and seed. {ANY_HEAD}") from error


def publish(release: Release) -> str:
    """Write the card into the folder, upload it with the checkpoint, and return the commit.

    Raises:
        ZooError: the Hub refuses the upload or cannot be reached.
    """
    release.card.save(release.folder / CARD_NAME)
    return upload(release.folder, release.repo_id)


def push_to_hub(model: DCP, repo_id: str, *, private: bool = False, license: str = LICENSE) -> str:
    """Upload a model's head, of any dataset, with a model card.

    Args:
        model: only its trained tensors are uploaded, never CLIP.
        repo_id: "org/name"; created if needed.
        private: whether a new repo is private.
        license: of the trained weights, as an identifier of the Hub.

    Returns:
        The commit: `create_model(f"hf-hub:{repo_id}@{commit}", pretrained=True)` loads exactly this upload.

    Raises:
        ZooError: the Hub refuses the upload or cannot be reached.
    """
    info = dict(model.info)
    if str(info.get("dataset")).startswith(SHARD_SCHEME):  # holds a local path
        info["dataset"] = public_name(info["dataset"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = model.save_pretrained(temporary, **info)
        make_card(model, repo_id, license, (folder / WEIGHTS_NAME).stat().st_size).save(folder / CARD_NAME)
        return upload(folder, repo_id, private)


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload the files of a checkpoint folder in one commit, and return that commit.

    A busy Hub is asked again. A folder that the Hub already has makes no new commit.
    """
    api = HfApi(library_name=HUB_LIBRARY)

    def send() -> str:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[WEIGHTS_NAME, CONFIG_NAME, CARD_NAME],
            commit_message="Upload a head with dcp_zoo",
        ).oid

    with explained(repo_id):
        return retried(send)


def pin(entries: dict[str, dict[str, Any]]) -> bool:
    """Write heads' entries, by name, into the manifest of a source checkout; False for an installed package."""
    if not (MANIFEST.parents[2] / "setup.cfg").is_file() or not os.access(MANIFEST.parent, os.W_OK):
        return False
    write_file(MANIFEST, json.dumps(json.loads(MANIFEST.read_text()) | entries, indent=1) + "\n", "")
    for cached in (trained_heads, all_heads):
        cached.cache_clear()
    return True
