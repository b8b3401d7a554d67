"""The registry, without torch: the table of models, `models.yaml`, with a row made for any other open_clip model, the
manifest of heads, and the functions that list them.

A head is what a method trained for one model and one dataset, named `model.dataset-Kshot[-seedS]`. The manifest
`heads.json` holds those that existed at the release, and the index on the Hub those published since; other combinations
of a CLIP model, the 11 datasets and shots are `planned`. The index is read only where a function says so.
"""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import TypedDict

import yaml

from dcp_zoo.backbone import MINI_CFG
from dcp_zoo.data.packaged import DATASETS, list_datasets
from dcp_zoo.errors import ZooError, check_choice, nearest, warn
from dcp_zoo.fields import Values, problems
from dcp_zoo.heads.config import WEIGHTS_NAME, DCPConfig

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = "open_clip:"  # before the name of an open_clip model: "ARCH/TAG", or one of the next with a place
CLIP_REPO, CLIP_FOLDER = "hf-hub:", "local-dir:"  # before the Hub repo or folder that describes an architecture


@dataclass(frozen=True)
class ModelSpec:
    name: str  # here and in timm's registry
    clip: str | None  # open_clip architecture, None for the bundled miniature
    clip_pretrained: str  # open_clip tag of CLIP's weights
    clip_repo: str | None  # Hub repo from which open_clip loads those weights
    image_size: int = 224  # height and width in pixels
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"  # of the test images, in timm's terms, as the next
    crop_mode: str = "center"  # "center" resizes the short side and crops, "squash" resizes both sides
    clip_revision: str | None = None  # commit of `clip_repo`, see hub/pin_clips.py; None: the newest, whatever it is
    parameters: int | None = None  # of both towers, in millions
    gflops: float | None = None  # of the image tower, for one image, as torch's `FlopCounterMode` counts them
    # published zero-shot top-1 in percent, not measured here; None: no table has it
    zero_shot: float | None = None  # the mean over ten of the 11 datasets, without UCF101
    imagenet: float | None = None
    accuracy_source: str = ""  # the table that has these two, and its date
    head_mb: float = 0  # megabytes of a head of DCP by the default recipe, without a text probe: float16
    default_tag: str = "imagenet-16shot"  # of the head that `pretrained=True` loads
    recipe: Values = field(default_factory=dict)  # changes to the release's, `dcp_zoo.training.Recipe`
    # changes to other methods' recipes, by their names; those under `per_shot` are multiplied by the shots
    baseline_recipes: dict[str, Values] = field(default_factory=dict)

    @property
    def accuracies(self) -> tuple[str, str]:
        """Both published accuracies as texts; "" without a figure."""
        mean, imagenet = ("" if value is None else f"{value:.1f}" for value in (self.zero_shot, self.imagenet))
        return mean, imagenet

    @property
    def download(self) -> str:
        """The size of CLIP's weights in float32, as most repos have them; "" if it is not known, or for the bundled."""
        return f"{4 * self.parameters / 1e3:.1f} GB" if self.clip and self.parameters else ""

    @property
    def license(self) -> str:
        """The licence of CLIP's weights; "" if it is not certain."""
        known = [tag for tag in LICENSES if self.clip_pretrained.startswith(tag)]
        return LICENSES[max(known, key=len)] if known else ""

    @property
    def dcp_options(self) -> Values:
        """What the recipe changes of `DCPConfig`."""
        return {part.name: self.recipe[part.name] for part in fields(DCPConfig) if part.name in self.recipe}

    @property
    def data_cfg(self) -> Values:
        """The preprocessing in timm's terms."""
        same = {name: getattr(self, name) for name in ("interpolation", "crop_mode", "mean", "std")}
        return {"input_size": (3, self.image_size, self.image_size), "fixed_input_size": True, "crop_pct": 1.0, **same}


TABLE: dict[str, Values] = yaml.safe_load((Path(__file__).parent / "models.yaml").read_text())
LICENSES = TABLE[".licenses"]
SIZES: dict[str, str] = TABLE[".sizes"]
TABLE["dcp_mini"] |= {name: MINI_CFG[name] for name in ("image_size", "mean", "std")}
ROWS = {name: row for name, row in TABLE.items() if not name.startswith(".")}
for row in ROWS.values():
    row |= {name: tuple(row[name]) for name in ("mean", "std") if name in row}
MODELS = {name: ModelSpec(name, **row) for name, row in ROWS.items()}
DEFAULT_HEAD = f"dcp_mini.{MODELS['dcp_mini'].default_tag}"
MINIATURE_NOTE = "dcp_mini is a miniature for trying things out. For real use: train --model small; see dcp-zoo list."


def get_spec(model: str, cache_dir: str | Path | None = None) -> ModelSpec:
    """The row of `MODELS`, by name or size, or one made for "open_clip:ARCH/TAG"; ZooError with the nearest names if it
    is unknown."""
    if model.startswith(OPEN_CLIP):
        return open_clip_spec(model, cache_dir)
    model = SIZES.get(model, model)
    if model not in MODELS:
        close = ", ".join(nearest(model, MODELS) or MODELS)
        hint = open_clip_hint(model) or f" Nearest: {close}."
        raise ZooError(f"Unknown model {model!r}.{hint} All: `dcp-zoo list` or dcp_zoo.list_models().")
    return MODELS[model]


def open_clip_hint(name: str) -> str:
    """The part of an error message that says how to write a name of open_clip's, ARCH or ARCH/TAG; "" for others."""
    import open_clip  # slow to import

    clip, _, tag = name.partition("/")
    if clip not in open_clip.list_models():
        return ""
    return f" open_clip's {clip} is {OPEN_CLIP}{clip}/{tag or 'TAG'}, with a tag of open_clip.list_pretrained()."


def described(clip: str, tag: str, cache_dir: str | Path | None = None) -> tuple[Values, Values]:
    """How open_clip describes weights, that is where they are and their preprocessing, and the sizes of the towers."""
    if clip.startswith((CLIP_REPO, CLIP_FOLDER)):
        from dcp_zoo.hub import clip_config

        return clip_config(clip, cache_dir)
    import open_clip

    return open_clip.get_pretrained_cfg(clip, tag), open_clip.get_model_config(clip)


def open_clip_spec(name: str, cache_dir: str | Path | None = None) -> ModelSpec:
    """A row for "open_clip:ARCH/TAG", "open_clip:hf-hub:ORG/REPO", or "open_clip:local-dir:FOLDER", made absolute."""
    place = name.removeprefix(OPEN_CLIP)
    clip, _, tag = place.partition("/")
    if place.startswith(CLIP_FOLDER):
        clip, tag = f"{CLIP_FOLDER}{Path(place.removeprefix(CLIP_FOLDER)).absolute()}", "local"
        name = f"{OPEN_CLIP}{clip}"
    elif place.startswith(CLIP_REPO):
        clip, tag = place, "hub"
    else:
        import open_clip

        pairs = ["/".join(pair) for pair in open_clip.list_pretrained()]
        if place not in pairs:
            close = nearest(place, pairs) or ["ViT-B-16/openai"]
            raise ZooError(
                f"open_clip has no model {place!r}. Nearest: {', '.join(close)}. All: open_clip.list_pretrained(); "
                f"names are {OPEN_CLIP}ARCH/TAG, {OPEN_CLIP}{CLIP_REPO}ORG/REPO, or {OPEN_CLIP}{CLIP_FOLDER}FOLDER."
            )
    preprocess, model = described(clip, tag, cache_dir)
    repo = preprocess.get("hf_hub", "").rstrip("/") or None
    size, crop_mode = model["vision_cfg"].get("image_size", 224), preprocess.get("resize_mode")
    crop_mode = crop_mode if crop_mode == "squash" else "center"
    mean, std = tuple(preprocess.get("mean", OPENAI_MEAN)), tuple(preprocess.get("std", OPENAI_STD))
    return ModelSpec(name, clip, tag, repo, size, mean, std, preprocess.get("interpolation", "bicubic"), crop_mode)


SHOTS = (1, 2, 4, 8, 16)
STATUSES = ("bundled", "published", "planned")
HUB_ORG = "dcp-zoo"
WEIGHTS = Path(__file__).parents[1] / "weights"
MANIFEST = Path(__file__).parent / "heads.json"


class IndexRow(TypedDict):
    """A head in an index; see `HeadEntry`."""

    revision: str
    sha256: str
    license: str | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class HeadEntry:
    """One set of trained prompts; ZooError for a name that is no `model.dataset-Kshot[-seedS]`."""

    name: str
    status: str = "planned"  # "bundled" (inside this package), "published" (on the Hub) or "planned" (not trained yet)
    org: str = HUB_ORG  # organisation on the Hub that published it; `DCP_ZOO_HUB_ORG` selects another
    revision: str | None = None  # pinned commit in that organisation; None while planned
    sha256: str | None = None  # of its model.safetensors there; None while planned
    license: str | None = None
    metrics: Values = field(default_factory=dict)  # measured by this project, such as top-1 accuracy in percent

    model: str = field(init=False)  # the parts of its name, as the next
    tag: str = field(init=False)
    dataset: str = field(init=False)
    shots: int = field(init=False)
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        model, _, tag = self.name.partition(".")
        match = re.fullmatch(r"(\w+)-(\d+)shot(?:-seed(\d+))?", tag)
        if match is None:
            raise ZooError(f"{tag!r} is not the tag of a head: tags look like imagenet-16shot or eurosat-4shot-seed2.")
        parts = {"model": model, "tag": tag, "dataset": match[1], "shots": int(match[2]), "seed": int(match[3] or 1)}
        vars(self).update(parts)  # this class is frozen

    @property
    def repo_id(self) -> str:
        """The repo on the Hub, in the organisation `DCP_ZOO_HUB_ORG` if set, otherwise in `org`."""
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
    def pretrained_cfg(self) -> Values:
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
        return f"dcp-zoo train --head {self.name} --data-root DIR"


@cache
def trained_heads() -> dict[str, HeadEntry]:
    """The heads of the manifest, which exist."""
    manifest = json.loads(MANIFEST.read_text())
    return {name: HeadEntry(name, **entry) for name, entry in manifest.items()}


@cache
def all_heads() -> dict[str, HeadEntry]:
    """All named heads: the trained ones, and for each CLIP model 11 datasets x 5 shots, seed 1."""
    planned = product((spec.name for spec in MODELS.values() if spec.clip), list_datasets(), SHOTS)
    names = [f"{model}.{dataset}-{shots}shot" for model, dataset, shots in planned]
    names += [f"{spec.name}.{spec.default_tag}" for spec in MODELS.values()]
    return {name: HeadEntry(name) for name in names} | trained_heads()


@cache
def parsed_index(org: str, index: bytes) -> dict[str, HeadEntry]:
    """The heads of an organisation by its index on the Hub, without rows that do not pin a head of a known model."""
    heads: dict[str, HeadEntry] = {}
    try:
        rows = dict(json.loads(index))
    except (ValueError, TypeError) as error:
        warn(f"The index of {org}'s heads on the Hub is damaged ({error}): only heads of this release are known.")
        return heads
    for name, values in rows.items():
        if not any(problems(values, IndexRow)) and name.partition(".")[0] in MODELS:
            row = {key: values[key] for key in IndexRow.__annotations__}
            if re.fullmatch("[0-9a-f]{40} [0-9a-f]{64}", f"{row['revision']} {row['sha256']}"):
                with suppress(ZooError):
                    heads[name] = HeadEntry(name, "published", org, **row)
    return heads


def indexed_heads() -> dict[str, HeadEntry]:
    """The heads that the organisation has published up to now, by its index on the Hub; without a network those of the
    cached index, if there is one."""
    from dcp_zoo.hub import read_index  # slow to import

    org = os.environ.get("DCP_ZOO_HUB_ORG") or HUB_ORG
    return parsed_index(org, read_index(org))


def newest(head: HeadEntry) -> HeadEntry:
    """A head as the index has it, if this release neither bundles nor pins it."""
    return head if head.status == "bundled" or head.pin[0] else indexed_heads().get(head.name, head)


def loadable_heads() -> dict[str, HeadEntry]:
    """All heads of the manifest, and of the index on the Hub."""
    return indexed_heads() | {name: newest(head) for name, head in trained_heads().items()}


def get_head(name: str, ask_hub: bool = True) -> HeadEntry:
    """The head `model.tag`, seeds 2 and 3 included; ZooError with the nearest names if it is unknown here and, with
    `ask_hub`, to the index on the Hub."""
    if head := all_heads().get(name):
        return head
    get_spec(name.partition(".")[0])  # raises for an unknown one
    head = HeadEntry(name)
    first_seed = re.sub(r"-seed[23]$", "", head.tag)
    # the miniature has heads of the 11 datasets too, which are not listed
    in_zoo = first_seed in (f"{dataset}-{shots}shot" for dataset in list_datasets() for shots in SHOTS)
    if in_zoo or f"{head.model}.{first_seed}" in all_heads():
        return head
    if ask_hub and (published := newest(head)) is not head:
        return published
    tags = [entry.tag for entry in all_heads().values() if entry.model == head.model]
    close = nearest(head.tag, tags) or tags[:5]
    problem = f"{head.model} has no head {head.tag!r}. Nearest: {', '.join(close)}. All: dcp-zoo list '{head.model}*'."
    raise ZooError(f"{problem} For fresh prompts on CLIP's weights, use pretrained='clip'.")


def has_head(name: str) -> bool:
    """Whether `get_head` accepts a name without asking the Hub."""
    with suppress(ZooError):
        return bool(get_head(name, ask_hub=False))
    return False


def list_models(
    filter: str | Sequence[str] = "",
    module: str | Sequence[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """Names of the zoo's models, with the parameters and in the order of `timm.list_models`.

    Args:
        filter, exclude_filters: wildcards such as "dcp_vitb16*" or "*-16shot", or lists of them.
        module: timm's families of models; the zoo has "dcp".
        pretrained: list heads that can be loaded, as `list_pretrained` does.
        name_matches_cfg: changes nothing, as every model has a configuration.
        include_tags: whether to list heads `model.tag`, without `pretrained` planned ones, too. Default: `pretrained`.
    """
    tags, heads = pretrained if include_tags is None else include_tags, loadable_heads() if pretrained else all_heads()
    names = [*heads] if tags else [*MODELS]
    if pretrained and not tags:  # as in timm, those whose default head is there
        names = [name for name in names if f"{name}.{MODELS[name].default_tag}" in heads]
    is_ours = not module or "dcp" in ([module] if isinstance(module, str) else module)
    return sorted(_matching(names if is_ours else [], filter, exclude_filters), key=_natural)


def _natural(name: str) -> list[int | str]:
    """timm's order: numbers within names by their value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def list_pretrained(filter: str | Sequence[str] = "", exclude_filters: str | Sequence[str] = "") -> list[str]:
    """Names `model.tag` of the heads that can be loaded now, from this package or the Hub, whose index is read; see
    `list_models`."""
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters)


def _matching(names: Iterable[str], filter: str | Sequence[str], exclude: str | Sequence[str] = "") -> list[str]:
    """The names that match one of the wildcards, by default all, but none of `exclude`; a model's matches its heads."""
    chosen, omitted = ([texts] if isinstance(texts, str) else list(texts) for texts in (filter or "*", exclude or []))

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatch(name, end) for pattern in patterns for end in (pattern, f"{pattern}.*"))

    return [name for name in names if matches(name, chosen) and not matches(name, omitted)]


def list_heads(filter: str = "", status: str | None = None) -> list[str]:
    """Names `model.tag` of all heads, including planned ones; the Hub's index is read.

    Args:
        filter: wildcard such as "dcp_vitb16*" or "*-16shot".
        status: "bundled" (in this package), "published" (on the Hub) or "planned"; ZooError for another. Default: all.
    """
    if status is not None:
        check_choice("status", status, STATUSES)
    heads = all_heads() | loadable_heads()
    return _matching((h.name for h in heads.values() if status in (None, h.status)), filter)


def is_model(name: str) -> bool:
    """Whether `name` is a model of the zoo, by name or size, with or without a `.tag`."""
    return SIZES.get(model := name.partition(".")[0], model) in MODELS
