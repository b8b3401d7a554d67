"""The registry of heads, and the lists of models and heads; it does not import torch.

A head is what a method trained for one model and one dataset, named `model.dataset-Kshot[-seedS]`. The manifest
`heads.json` holds the heads that existed at the release, the index on the Hub those published since; other
combinations of a CLIP model, the 11 datasets and shots are `planned`. Only functions whose docstring says so
read the index over the network.
"""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.data.packaged import DATASETS, list_datasets
from dcp_zoo.errors import ZooError, check_choice, nearest_hint, warn
from dcp_zoo.fields import Values, problems
from dcp_zoo.heads.config import WEIGHTS_NAME
from dcp_zoo.zoo.specs import MODELS, SIZES, ModelSpec, get_spec

CLIP_TAG = "clip"  # in place of a head's: CLIP's own weights, without a head
SHOTS = (1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)
HUB_ORG = "dcp-zoo"
WEIGHTS = Path(__file__).parents[1] / "weights"
MANIFEST = Path(__file__).parent / "heads.json"


def hub_orgs() -> list[str]:
    """The organisations that `DCP_ZOO_HUB_ORG` names, separated by commas; [] for none."""
    names = os.environ.get("DCP_ZOO_HUB_ORG", "").split(",")
    return [name.strip() for name in names if name.strip()]


INDEXED = ("revision", "sha256", "license", "metrics")  # of a `HeadEntry`: its row in an index


@dataclass(frozen=True)
class HeadEntry:
    """One set of trained prompts; `named` makes it from its name."""

    name: str
    model: str
    tag: str
    dataset: str
    shots: int
    seed: int
    status: str = "planned"  # "bundled" (inside this package), "published" (on the Hub) or "planned" (not trained yet)
    org: str = HUB_ORG  # organisation on the Hub that published it; `DCP_ZOO_HUB_ORG` selects others
    revision: str | None = None  # pinned commit in that organisation; None while planned
    sha256: str | None = None  # of its model.safetensors there; None while planned
    license: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # top-1 in percent, measured here

    @classmethod
    def named(cls, name: str, **known: Any) -> "HeadEntry":
        """The head of a name `model.dataset-Kshot[-seedS]`, with what else is known of it; ZooError for other
        names."""
        model, _, tag = name.partition(".")
        match = re.fullmatch(r"(\w+)-([1-9]\d*)shot(?:-seed(?!1$)([1-9]\d*))?", tag)  # no other name for the first seed
        if match is None:
            raise ZooError(f"{tag!r} is not the tag of a head: tags look like imagenet-16shot or eurosat-4shot-seed2.")
        dataset, shots, seed = match.groups(default="1")
        return cls(name, model, tag, dataset, int(shots), int(seed), **known)

    @property
    def place(self) -> tuple[str, str | None, str | None]:
        """The repo on the Hub, and what it is pinned to there: revision and sha256, None for a planned head. If
        `DCP_ZOO_HUB_ORG` names other organisations, it is unpinned, in the first of them."""
        orgs = hub_orgs()
        if orgs and self.org not in orgs:
            return f"{orgs[0]}/{self.name}", None, None
        return f"{self.org}/{self.name}", self.revision, self.sha256

    @property
    def is_fixed(self) -> bool:
        """Whether this release bundles or pins it."""
        return self.status == "bundled" or self.place[1] is not None

    @property
    def bundled_dir(self) -> Path:
        """The head's folder inside the package, if it is bundled."""
        return WEIGHTS / self.name

    @property
    def pretrained_cfg(self) -> Values:
        """timm's `pretrained_cfg`: preprocessing, number of classes, licence, and where the weights are."""
        repo, revision, _ = self.place
        place = self.bundled_dir / WEIGHTS_NAME if self.status == "bundled" else pinned(repo, revision)
        return weights_cfg(get_spec(self.model), self.tag, self.dataset, self.license, place)

    @property
    def train_command(self) -> str:
        return f"dcp-zoo train --head {self.name} --data-root DIR"


def clip_cfg(spec: ModelSpec) -> Values:
    """timm's `pretrained_cfg` of CLIP's own weights, for the classes that a model has without others."""
    dataset = HeadEntry.named(spec.default_head).dataset
    place = pinned(spec.clip_repo, spec.clip_revision) if spec.clip else MINI_WEIGHTS
    return weights_cfg(spec, CLIP_TAG, dataset, spec.license, place)


def weights_cfg(spec: ModelSpec, tag: str, dataset: str, license: str | None, place: Path | str) -> Values:
    """timm's `pretrained_cfg` of weights for the classes of a dataset, in a file or `pinned` on the Hub."""
    cfg = spec.data_cfg | {"architecture": spec.name, "tag": tag}
    if isinstance(place, Path):
        cfg |= {"file": str(place), "source": "file"}
    else:
        cfg |= {"hf_hub_id": place, "source": "hf-hub"}
    if dataset in DATASETS:
        cfg["num_classes"] = DATASETS[dataset].num_classes
    if license:
        cfg["license"] = license
    return cfg


def pinned(repo: str | None, revision: str | None) -> str:
    """A repo of the Hub at a revision, by default the newest, as timm writes it."""
    return f"{repo}@{revision}" if revision else str(repo)


@cache
def trained_heads() -> dict[str, HeadEntry]:
    """The heads of the manifest, which exist."""
    manifest = json.loads(MANIFEST.read_text())
    return {name: HeadEntry.named(name, **entry) for name, entry in manifest.items()}


@cache
def all_heads() -> dict[str, HeadEntry]:
    """The heads of this release: the trained ones, and those planned, for each CLIP model 11 datasets x 5
    shots, seed 1."""
    heads = {}
    for model, dataset, shots in product(MODELS, list_datasets(), SHOTS):
        if MODELS[model].clip:
            name = f"{model}.{dataset}-{shots}shot"
            heads[name] = HeadEntry.named(name)
    return heads | trained_heads()


def indexed_heads() -> tuple[dict[str, HeadEntry], str]:
    """The heads that the organisations have published up to now, by their indexes on the Hub, and why there may
    be others, see `read_index`. Of heads with the same name, that of the first organisation counts. Rows
    that do not pin a head of a known model are left out."""
    from dcp_zoo.hub import read_index  # slow to import

    heads: dict[str, HeadEntry] = {}
    problem = ""
    for org in hub_orgs() or [HUB_ORG]:
        rows, found = read_index(org)
        problem = problem or found
        for name, row in rows.items():
            if name in heads or name.partition(".")[0] not in MODELS:
                continue
            with suppress(ZooError, TypeError, KeyError):  # of what is no name, no row, or not complete
                head = HeadEntry.named(name, status="published", org=org, **{key: row[key] for key in INDEXED})
                pin = re.fullmatch("[0-9a-f]{40} [0-9a-f]{64}", f"{head.revision} {head.sha256}")
                if pin and not any(problems(vars(head), HeadEntry)):
                    heads[name] = head
    return heads, problem


def newest(head: HeadEntry) -> HeadEntry:
    """A head as the index has it, if this release neither bundles nor pins it."""
    return head if head.is_fixed else indexed_heads()[0].get(head.name, head)


def known_heads() -> dict[str, HeadEntry]:
    """The heads of this release and of the index on the Hub, with a warning if the Hub does not answer."""
    published, problem = indexed_heads()
    if problem:
        warn(f"The Hub may have more heads than are known here: {problem}")
    here = all_heads()
    return here | published | {name: head for name, head in here.items() if head.is_fixed}


def find_head(name: str) -> HeadEntry | None:
    """The head of a name that this release knows, also those that are planned but not listed: of seeds 2 and
    3, and of the miniature for the 11 datasets; None for others."""
    if name in all_heads():
        return all_heads()[name]
    with suppress(ZooError):
        head = HeadEntry.named(name)
        if head.model in MODELS and head.dataset in list_datasets() and head.shots in SHOTS and head.seed in SEEDS:
            return head
    return None


def get_head(name: str) -> HeadEntry:
    """The head of a name that `find_head` or the index on the Hub knows; ZooError with the nearest names for
    others."""
    head = find_head(name)
    if head:
        return head
    get_spec(name.partition(".")[0])  # raises for an unknown one
    unknown = HeadEntry.named(name)
    published, problem = indexed_heads()
    if name in published:
        return published[name]
    tags = [entry.tag for entry in all_heads().values() if entry.model == unknown.model]
    not_asked = problem and f" It may be on the Hub: {problem}"
    raise ZooError(
        f"{unknown.model} has no head {unknown.tag!r}.{nearest_hint(unknown.tag, tags)} All: dcp-zoo list. For fresh "
        f"prompts on CLIP's weights, use pretrained='clip'.{not_asked}"
    )


Wildcards = str | Sequence[str]


def list_models(
    filter: Wildcards = "",
    module: str | Sequence[str] = "",
    pretrained: bool = False,
    exclude_filters: Wildcards = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """Names of the zoo's models, with the parameters and in the order of `timm.list_models`; without a
    network.

    Args:
        filter, exclude_filters: wildcards such as "dcp_vitb16*" or "*-16shot", or lists of them.
        module: timm's families of models; the zoo has "dcp".
        pretrained: list only what has weights as of this release: heads that are bundled or pinned, and
            CLIP's own. For heads that were published since, see `list_pretrained`.
        name_matches_cfg: changes nothing, as every model has a configuration.
        include_tags: whether to list heads `model.tag`, without `pretrained` planned ones, too, and CLIP's
            own weights as `model.clip`. Default: `pretrained`.
    """
    if module and "dcp" not in module:
        return []
    if include_tags is None:
        include_tags = pretrained
    heads = trained_heads() if pretrained else all_heads()
    if include_tags:
        names = _with_clips(heads)
    elif pretrained:  # as in timm, the models whose default head has weights
        names = [name for name, spec in MODELS.items() if spec.default_head in heads]
    else:
        names = list(MODELS)
    return matching(names, filter, exclude_filters)


def list_pretrained(filter: Wildcards = "", exclude_filters: Wildcards = "") -> list[str]:
    """Names `model.tag` of what can be loaded now, from this package or the Hub, whose index is read: heads,
    and as `model.clip` CLIP's own weights. A warning says why if the Hub does not answer."""
    loadable = [head.name for head in known_heads().values() if head.status != "planned"]
    return matching(_with_clips(loadable), filter, exclude_filters)


def _with_clips(heads: Iterable[str]) -> list[str]:
    """The names of heads, and of CLIP's own weights for every model."""
    return [*heads, *(f"{name}.{CLIP_TAG}" for name in MODELS)]


def matching(names: Iterable[str], filter: Wildcards, exclude: Wildcards = "") -> list[str]:
    """The names that match a wildcard of `filter`, by default all, and none of `exclude`, in timm's order,
    by the values of numbers within them; the wildcard of a model matches its heads, too."""

    every = list(names)

    def chosen(patterns: Wildcards) -> set[str]:
        found = set[str]()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found.update(fnmatch.filter(every, pattern), fnmatch.filter(every, f"{pattern}.*"))
        return found

    def order(name: str) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]

    return sorted(chosen(filter or "*") - chosen(exclude), key=order)


def list_heads(filter: str = "", status: str | None = None, hub: bool = False) -> list[Any]:
    """Names `model.tag` of all heads, including planned ones; the Hub's index is read. A warning says why if
    the Hub does not answer.

    Args:
        filter: wildcard such as "dcp_vitb16*" or "*-16shot".
        status: "bundled" (in this package), "published" (on the Hub) or "planned"; ZooError for another.
            Default: all.
        hub: whether to search the Hub for heads of all owners instead, whose NAME or ORG/NAME matches the
            filter. Each has `owner`, `head`, `dataset`, `top1` as claimed, `commit`, and the `name` by
            which it loads; nothing of this was checked. ZooError if the Hub does not answer.
    """
    if hub:
        from dcp_zoo.hub import search_heads  # slow to import

        return [found for found in search_heads() if matching([found.head, f"{found.owner}/{found.head}"], filter)]
    check_choice("status", status, (None, "bundled", "published", "planned"))
    names = [head.name for head in known_heads().values() if status in (None, head.status)]
    return matching(names, filter)


def is_model(name: str) -> bool:
    """Whether `name` is a model of the zoo, by name or size, with or without a `.tag`."""
    model = name.partition(".")[0]
    return model in MODELS or model in SIZES
