"""The registry: the table of models (`dcp_zoo.zoo.models`), one manifest of heads, and the functions that list them.

A head is a set of trained prompts for one model and one dataset, named `model.dataset-Kshot[-seedS]`. The manifest
`heads.json` holds the heads that exist; every other combination of a CLIP model, one of the 11 datasets and a number
of shots is `planned`: it has a name and a repo id, but has not been trained yet.
"""

import fnmatch
import json
import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dcp_zoo.data.table import DATASETS, list_datasets
from dcp_zoo.errors import ZooError, check_choice, nearest
from dcp_zoo.model.config import WEIGHTS_NAME
from dcp_zoo.zoo.models import MODELS, get_spec

SHOTS = (1, 2, 4, 8, 16)
STATUSES = ("bundled", "published", "planned")
HUB_ORG = "dcp-zoo"
WEIGHTS = Path(__file__).parents[1] / "weights"
MANIFEST = Path(__file__).parent / "heads.json"


@dataclass(frozen=True)
class HeadEntry:
    """One set of trained prompts.

    Attributes:
        status: "bundled" (inside this package), "published" (on the Hub) or "planned" (not trained yet).
        org: organisation on the Hub that published it. `DCP_ZOO_HUB_ORG` selects another.
        revision, sha256: pinned commit and hash of its model.safetensors in that organisation, None while planned.
        metrics: measured by this project, such as top-1 accuracy in percent.
    """

    name: str
    status: str = "planned"
    org: str = HUB_ORG
    revision: str | None = None
    sha256: str | None = None
    license: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]

    @property
    def dataset(self) -> str:
        return _parsed(self.tag)[0]

    @property
    def shots(self) -> int:
        return _parsed(self.tag)[1]

    @property
    def seed(self) -> int:
        return _parsed(self.tag)[2]

    @property
    def repo_id(self) -> str:
        """Its repo on the Hub, in the organisation `DCP_ZOO_HUB_ORG` if set, otherwise in `org`."""
        return f"{os.environ.get('DCP_ZOO_HUB_ORG') or self.org}/{self.name}"

    @property
    def pin(self) -> tuple[str | None, str | None]:
        """Revision and sha256 of `repo_id`; None, None if unknown: a planned head, or another organisation's."""
        is_own_org = os.environ.get("DCP_ZOO_HUB_ORG") in (None, "", self.org)
        return (self.revision, self.sha256) if is_own_org else (None, None)

    @property
    def bundled_dir(self) -> Path:
        """The head's folder inside the package, if it is bundled."""
        return WEIGHTS / self.name

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's `pretrained_cfg`: preprocessing, number of classes, licence, and where the weights are."""
        cfg = get_spec(self.model).data_cfg | {"architecture": self.model, "tag": self.tag}
        if self.status == "bundled":
            cfg |= {"file": str(self.bundled_dir / WEIGHTS_NAME), "source": "file"}
        else:
            revision, _ = self.pin
            cfg |= {"hf_hub_id": f"{self.repo_id}@{revision}" if revision else self.repo_id, "source": "hf-hub"}
        if self.dataset in DATASETS:
            cfg["num_classes"] = DATASETS[self.dataset].num_classes
        return cfg | ({"license": self.license} if self.license else {})

    @property
    def train_command(self) -> str:
        """The command that trains this head."""
        return f"dcp-zoo train --head {self.name} --data-root DIR"


@cache
def _parsed(tag: str) -> tuple[str, int, int]:
    """`dataset-Kshot[-seedS]` -> dataset, K, S."""
    match = re.fullmatch(r"(\w+)-(\d+)shot(?:-seed(\d+))?", tag)
    if match is None:
        raise ZooError(f"{tag!r} is not the tag of a head: tags look like imagenet-16shot or eurosat-4shot-seed2.")
    return match[1], int(match[2]), int(match[3] or 1)


@cache
def trained_heads() -> dict[str, HeadEntry]:
    """The heads of the manifest, which exist."""
    manifest = json.loads(MANIFEST.read_text())
    return {name: HeadEntry(name, **entry) for name, entry in manifest.items()}


@cache
def all_heads() -> dict[str, HeadEntry]:
    """All named heads: the trained ones, and for each CLIP model 11 datasets x 5 shots, seed 1."""
    planned = (
        f"{spec.name}.{dataset}-{shots}shot"
        for spec in MODELS.values()
        if spec.clip
        for dataset in list_datasets()
        for shots in SHOTS
    )
    defaults = (f"{spec.name}.{spec.default_tag}" for spec in MODELS.values())
    return {name: HeadEntry(name) for name in (*planned, *defaults)} | trained_heads()


def get_head(name: str) -> HeadEntry:
    """The head `model.tag`, seeds 2 and 3 included; ZooError with the nearest names if it is unknown."""
    if name in all_heads():
        return all_heads()[name]
    head = HeadEntry(name)
    get_spec(head.model)  # raises for an unknown one
    first_seed = re.sub(r"-seed[23]$", "", head.tag)
    # the miniature has heads of the 11 datasets too, which are not listed
    in_zoo = first_seed in (f"{dataset}-{shots}shot" for dataset in list_datasets() for shots in SHOTS)
    if in_zoo or f"{head.model}.{first_seed}" in all_heads():
        return head
    tags = [entry.tag for entry in all_heads().values() if entry.model == head.model]
    close = nearest(head.tag, tags) or tags[:5]
    raise ZooError(
        f"{head.model} has no head {head.tag!r}. Nearest: {', '.join(close)}. All: dcp-zoo list '{head.model}*'. "
        "For fresh prompts on CLIP's weights, use pretrained='clip'."
    )


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the zoo's models or, with `pretrained`, of the heads that can be loaded; `filter` is a wildcard."""
    return _filtered(trained_heads() if pretrained else MODELS, filter)


def list_pretrained(filter: str = "") -> list[str]:
    """Names `model.tag` of the heads that can be loaded now, from this package or the Hub; `filter` is a wildcard such
    as "dcp_vitb16*" or "*-16shot"."""
    return _filtered(trained_heads(), filter)


def list_heads(filter: str = "", status: str | None = None) -> list[str]:
    """Names `model.tag` of all heads, including planned ones.

    Args:
        filter: wildcard such as "dcp_vitb16*" or "*-16shot".
        status: "bundled" (in this package), "published" (on the Hub) or "planned" (not trained yet). Default: all.

    Raises:
        ZooError: an unknown status.
    """
    if status is not None:
        check_choice("status", status, STATUSES)
    return _filtered((h.name for h in all_heads().values() if status in (None, h.status)), filter)


def is_model(name: str) -> bool:
    """Whether `name` is a model of the zoo, with or without a `.tag`."""
    return name.split(".", 1)[0] in MODELS


def _filtered(names: Any, pattern: str) -> list[str]:
    return [name for name in names if fnmatch.fnmatch(name, pattern or "*")]
