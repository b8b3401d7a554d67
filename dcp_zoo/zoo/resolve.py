"""From a name to a model's row in the table and its checkpoint. Only here are names taken apart, without torch."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dcp_zoo.errors import ZooError, nearest_hint, warn
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import CONFIG_NAME, HeadConfig, checkpoint_folder, is_checkpoint, read_config
from dcp_zoo.zoo import registry
from dcp_zoo.zoo.registry import OPEN_CLIP, HeadEntry, ModelSpec, get_head, get_spec

FRESH = (False, "clip")  # what `pretrained` is for fresh prompts
SCHEMES = "hf-hub:org/repo[@revision], local-dir:path, open_clip:ARCH/TAG"


class Name(NamedTuple):
    kind: str  # "zoo", "open_clip", "local-dir" or "hf-hub"
    place: str  # the model, open_clip's name of a CLIP, a folder, or a Hub repo
    tag: str = ""  # of a head of the zoo, or the revision of a Hub repo; "" if not given

    def __str__(self) -> str:
        """A name that `resolve` understands from any working folder of the same machine."""
        separator = "@" if self.kind == "hf-hub" else "."
        whole = self.place + (f"{separator}{self.tag}" if self.tag else "")
        return whole if self.kind == "zoo" else f"{self.kind}:{whole}"


def parse_name(name: str) -> Name:
    """Take a name apart: a model, a head, a checkpoint folder or one of its two files, or one of `SCHEMES`; nothing is
    downloaded. ZooError, with the nearest names, if it is none of them."""
    kind, _, place = name.partition(":")
    if name.startswith(OPEN_CLIP):
        return Name(kind, place)
    if name.startswith("hf-hub:"):
        repo_id, _, revision = place.partition("@")
        return Name(kind, repo_id, revision)
    is_local = name.startswith("local-dir:")
    path = place if is_local else name
    if registry.is_model(name) and not is_local:
        model, _, tag = name.partition(".")
        known = registry.has_head(name) if tag else model in registry.MODELS  # a folder may be called small
        if known or not is_checkpoint(path):
            return Name("zoo", registry.SIZES.get(model, model), tag)
    if is_checkpoint(path) or os.path.isdir(path):  # noqa: PTH112  Path would raise for long names
        return Name("local-dir", str(checkpoint_folder(path)))
    beside = [str(config.parent) for config in Path(path).parent.glob(f"*/{CONFIG_NAME}")]
    if is_local:
        hint = nearest_hint(path, beside)
        raise ZooError(f"{path} is not a checkpoint: it has no {CONFIG_NAME}.{hint} Pass a folder written by training.")
    hint = nearest_hint(name, [*beside, *registry.trained_heads(), *registry.MODELS])
    problem = f"{name!r} is neither a checkpoint folder nor a head of the zoo.{registry.open_clip_hint(name) or hint}"
    raise ZooError(f"{problem} All: dcp-zoo list, dcp_zoo.list_models(). Other sources: {SCHEMES}.")


@dataclass(frozen=True)
class Source:
    """What a name stands for."""

    architecture: str  # the model's name; "custom" for a checkpoint of a CLIP that the zoo does not know
    head: HeadEntry | None = None  # of the name, or the model's default head; None for names that are not the zoo's
    folder: Path | None = None  # of the checkpoint; None if there is none, or none is needed
    config: HeadConfig | None = None  # the checkpoint's checked config.json
    cache_dir: str | Path | None = None  # where downloads are kept
    pretrained: bool | str = True  # as asked for, see `create_model`

    @property
    def is_trained(self) -> bool:
        """Whether it stands for a trained head, and not for fresh prompts."""
        return self.config is not None and self.pretrained not in FRESH

    @property
    def spec(self) -> ModelSpec:
        """The model's row; ZooError if the checkpoint is of a CLIP or of weights that the zoo does not know."""
        if self.architecture == "custom":
            problem = f"The head in {self.folder} was trained on a CLIP outside the zoo."
            load = f"dcp_zoo.load_head(model, {str(self.folder)!r})"
            raise ZooError(f"{problem} Build model = dcp_zoo.DCP(clip, classnames, ...) around it, then call {load}.")
        spec = get_spec(self.architecture, self.cache_dir)
        if self.config and (tag := self.config["dcp"]["clip"]) != spec.clip_pretrained:
            problem = f"The head in {self.folder} was trained on weights {tag!r} of CLIP"
            raise ZooError(f"{problem}, but {spec.name} has {spec.clip_pretrained!r}: train it again.")
        return spec


def resolve(name: str, pretrained: bool | str = True, cache_dir: str | Path | None = None) -> Source:
    """What a name stands for; a head's checkpoint is in the package, in the local cache or downloaded from the Hub. For
    the arguments see `create_model`; checkpoint folders and Hub repos are read in any case."""
    kind, place, tag = parse_name(name)
    if kind == "open_clip":
        if pretrained not in FRESH:
            raise ZooError(f"{name} has no heads: pass pretrained='clip' for CLIP's weights and fresh prompts.")
        return Source(name, cache_dir=cache_dir, pretrained=pretrained)
    if kind == "zoo":
        return _of_the_zoo(place, tag, pretrained, cache_dir)
    if pretrained not in (*FRESH, True):
        problem = f"{name} is one head, and pretrained={pretrained!r} names another"
        raise ZooError(f"{problem}: pass True for its weights, or 'clip' for CLIP's weights and fresh prompts.")
    folder = Path(place)
    if kind == "hf-hub":
        from dcp_zoo.hub import download_head  # slow to import

        folder = download_head(place, tag or None, cache_dir=cache_dir)
    config = read_config(folder)
    return Source(config["architecture"], None, folder, config, cache_dir, pretrained)


def _of_the_zoo(model: str, tag: str, pretrained: bool | str, cache_dir: str | Path | None) -> Source:
    """What `model.tag` stands for, or the head of the model that `pretrained` names."""
    if isinstance(pretrained, str) and tag and pretrained != tag:
        raise ZooError(f"'{model}.{tag}' names the head {tag!r}, but pretrained={pretrained!r} another: pass only one.")
    head = get_head(f"{model}.{tag or get_spec(model).default_tag}")
    if pretrained in FRESH:
        return Source(model, head, cache_dir=cache_dir, pretrained=pretrained)
    head = head if pretrained is True else get_head(f"{model}.{pretrained}")
    folder = trained_here(head)
    if folder is None:
        head = registry.newest(head)
        folder = head.bundled_dir if head.status == "bundled" else _download(head, cache_dir)
    config = read_config(folder)
    return Source(config["architecture"], head, folder, config, cache_dir, pretrained)


def trained_here(head: HeadEntry) -> Path | None:
    """The checkpoint in the working folder that is called like a planned head, and is loaded as that; otherwise None.
    Where a checkpoint is called like a head, a warning says once which one the name stands for."""
    if not is_checkpoint(name := head.name):
        return None
    folder, is_head = Path(name).absolute(), head.status == "planned"
    other = f"the {head.status} head {name}, not the one in {folder}: that is local-dir:{name}"
    text = f"{name} is {f'the head that was trained in {folder}' if is_head else other}."
    warnings.warn(text, stacklevel=1)  # from one place, so that it is said once
    return folder if is_head else None


def local_heads() -> list[str]:
    """The planned heads that were trained in the working folder."""
    names = sorted(config.parent.name for config in Path().glob(f"dcp_*.*/{CONFIG_NAME}"))
    return [name for name in names if registry.has_head(name) and get_head(name).status == "planned"]


def name_of(folder: Path) -> str:
    """A name by which the checkpoint in a folder is loaded."""
    name = str(folder)
    is_zoos = name in registry.MODELS or (registry.has_head(name) and get_head(name).status != "planned")
    return f"local-dir:{name}" if is_zoos else name


def _download(head: HeadEntry, cache_dir: str | Path | None) -> Path:
    """The folder of a registered head at its pinned revision, or unpinned with a warning."""
    from dcp_zoo.hub import download_head, is_absent  # slow to import

    revision, sha256 = head.pin
    if revision is not None:
        return download_head(head.repo_id, revision, sha256, cache_dir)
    try:
        folder = download_head(head.repo_id, cache_dir=cache_dir)
    except ZooError as error:
        if head.status != "planned" or os.environ.get("DCP_ZOO_HUB_ORG") or not is_absent(error):
            raise
        problem = f"{head.name} is planned: nobody has trained it. Train it: {head.train_command}"
        raise ZooError(f"{problem}. Heads that exist: dcp-zoo list.") from None  # the Hub's answer says no more
    warn(
        f"{head.name} is not pinned in this version of dcp_zoo: this is the newest revision of {head.repo_id} on the "
        "Hub."
    )
    return folder


def get_pretrained_cfg(name: str) -> Values:
    """timm's `pretrained_cfg` for a model or a head: input size, mean and std, crop, classes, licence, origin."""
    source = resolve(name, pretrained=False)
    if source.head:
        return source.head.pretrained_cfg
    return source.spec.data_cfg | {"architecture": source.architecture}


def get_pretrained_cfg_value(name: str, key: str) -> Any:
    """A value of `get_pretrained_cfg`; None if it has none of that name."""
    return get_pretrained_cfg(name).get(key)


def head_folder(name: str) -> Path:
    """The folder of a head's checkpoint, downloaded if needed; see `resolve`."""
    folder = resolve(name).folder
    assert folder is not None
    return folder
