"""From a name to a model's row in the table and its checkpoint. All names are parsed here; it does not
import torch."""

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from dcp_zoo.backbone.preprocessing import preprocessing_in
from dcp_zoo.errors import ZooError, ZooWarning, check_choice, nearest_hint, warn
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import CONFIG_NAME, HeadConfig, checkpoint_folder, is_checkpoint, read_config
from dcp_zoo.zoo import registry, specs
from dcp_zoo.zoo.registry import CLIP_TAG, HeadEntry, get_head
from dcp_zoo.zoo.specs import OPEN_CLIP, ModelSpec, get_spec

FRESH = (False, CLIP_TAG)  # what `pretrained` is for fresh prompts


class Name(NamedTuple):
    kind: str  # "zoo", "open_clip", "local-dir" or "hf-hub"
    place: str  # the model, open_clip's name of a CLIP, a folder, or a Hub repo
    tag: str = ""  # of a head of the zoo, or the revision of a Hub repo; "" if not given

    def __str__(self) -> str:
        """A name that `resolve` understands from any working folder of the same machine."""
        name = self.place if self.kind == "zoo" else f"{self.kind}:{self.place}"
        if self.tag:
            name += f"@{self.tag}" if self.kind == "hf-hub" else f".{self.tag}"
        return name


def parse_name(name: str) -> Name:
    """Parse the name of a model, a head, a checkpoint folder or one of its two files, or a name with a scheme;
    nothing is downloaded. ZooError, with the nearest names, if it is none of them."""
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
        known = registry.find_head(name) if tag else model in specs.MODELS  # a folder may be called small
        if known or not is_checkpoint(path):
            return Name("zoo", specs.SIZES.get(model, model), tag)
    if is_checkpoint(path) or os.path.isdir(path):  # noqa: PTH112  Path would raise for long names
        return Name("local-dir", str(checkpoint_folder(path)))
    folders = [str(config.parent) for config in Path(path).parent.glob(f"*/{CONFIG_NAME}")]
    names = [*folders, *registry.trained_heads(), *specs.MODELS]
    hint = specs.open_clip_hint(name) or nearest_hint(path, names)
    raise ZooError(
        f"{name!r} is neither a checkpoint folder nor a head of the zoo.{hint} All: dcp-zoo list, "
        "dcp_zoo.list_models(). Other sources: hf-hub:org/repo[@revision], local-dir:path, open_clip:ARCH/TAG."
    )


class Resolved(NamedTuple):
    """What a name stands for."""

    spec: ModelSpec  # the model's row
    head: HeadEntry | None = None  # of the name, or the model's default head; None for names that are not the zoo's
    folder: Path | None = None  # of the checkpoint; None if there is none, or none is needed
    config: HeadConfig | None = None  # the checkpoint's checked config.json
    pretrained: bool | str = True  # as asked for, see `create_model`

    @property
    def is_trained(self) -> bool:
        """Whether it stands for a trained head, and not for fresh prompts."""
        return self.config is not None and self.pretrained not in FRESH

    @property
    def data_cfg(self) -> Values:
        """The preprocessing, in timm's terms: the checkpoint's, or the model's."""
        own = preprocessing_in(self.config["pretrained_cfg"]) if self.config else {}
        return self.spec.data_cfg | own


def of_checkpoint(folder: Path, pretrained: bool | str, head: HeadEntry | None = None) -> Resolved:
    """A checkpoint, perhaps as a head of the zoo; ZooError if it is of a CLIP or of weights that the zoo does
    not know."""
    config = read_config(folder)
    if config["architecture"] == "custom":
        raise ZooError(
            f"The head in {folder} was trained on a CLIP outside the zoo. Build model = dcp_zoo.DCP(clip, classnames, "
            "...) around it, then call dcp_zoo.load_head(model, FOLDER)."
        )
    spec = get_spec(config["architecture"])
    tag = config["dcp"]["clip"]
    if tag != spec.clip_pretrained:
        raise ZooError(
            f"The head in {folder} was trained on weights {tag!r} of CLIP, but {spec.name} has "
            f"{spec.clip_pretrained!r}: train it again."
        )
    return Resolved(spec, head, folder, config, pretrained)


def resolve(name: str, pretrained: bool | str = True, num_classes: int | None = None) -> Resolved:
    """What a name stands for; a head's checkpoint is in the package, in the local cache or downloaded from
    the Hub. Checkpoint folders and Hub repos are read in any case.

    Args:
        name, pretrained: see `create_model`.
        num_classes: of a fresh classifier, or 0 for none. If the model's default head has another number and
            nobody has published it, the name of the model stands for CLIP's own weights, and a warning says
            so.
    """
    kind, place, tag = parse_name(name)
    if kind == "open_clip":
        if pretrained not in FRESH:
            raise ZooError(f"{name} has no heads: pass pretrained='clip' for CLIP's weights and fresh prompts.")
        return Resolved(get_spec(name), pretrained=pretrained)
    if kind == "zoo":
        return _of_the_zoo(place, tag, pretrained, num_classes)
    check_choice(f"pretrained of {name}, which is one head:", pretrained, (True, *FRESH))
    folder = Path(place) if kind == "local-dir" else _download(place, tag or None)
    return of_checkpoint(folder, pretrained)


def _of_the_zoo(model: str, tag: str, pretrained: bool | str, num_classes: int | None) -> Resolved:
    """What `model.tag` stands for, or the head of the model that `pretrained` names."""
    if isinstance(pretrained, str):
        if tag not in ("", pretrained):
            raise ZooError(f"'{model}.{tag}' names {tag!r}, but pretrained={pretrained!r} another: pass only one.")
        tag = pretrained
    spec = get_spec(model)
    if tag == CLIP_TAG:
        return Resolved(spec, get_head(spec.default_head), pretrained=CLIP_TAG if pretrained else False)
    head = get_head(f"{model}.{tag}" if tag else spec.default_head)
    if not pretrained:
        return Resolved(spec, head, pretrained=False)
    folder = trained_here(head)
    if folder is None:
        head = registry.newest(head)
        # nobody has asked for the classes of a default head, whose classifier is replaced
        is_optional = not tag and num_classes not in (None, head.pretrained_cfg["num_classes"])
        folder = head.bundled_dir if head.status == "bundled" else _published(head, is_optional)
    if folder is None:
        warn(
            f"CLIP's own weights of {model} are loaded, with fresh prompts, as by {model}.clip: its default head "
            f"{head.name} is not published yet, and its classifier is not asked for."
        )
        return Resolved(spec, head, pretrained=CLIP_TAG)
    return of_checkpoint(folder, pretrained, head)


def trained_here(head: HeadEntry) -> Path | None:
    """The checkpoint folder of a planned head's name in the working folder, which is loaded as that head;
    otherwise None. Where a folder has a head's name, a warning says once which of the two is loaded."""
    name = head.name
    if not is_checkpoint(name):
        return None
    folder = Path(name).absolute()
    is_planned = head.status == "planned"
    if is_planned:
        text = f"{name} is the head that was trained in {folder}."
    else:
        text = f"{name} is the {head.status} head {name}, not the one in {folder}: that is local-dir:{name}."
    warnings.warn(text, ZooWarning, stacklevel=1)  # always from this line, so that it is shown once
    return folder if is_planned else None


def local_heads() -> list[HeadEntry]:
    """The planned heads that were trained in the working folder."""
    names = sorted(config.parent.name for config in Path().glob(f"dcp_*.*/{CONFIG_NAME}"))
    return [head for head in map(registry.find_head, names) if head and head.status == "planned"]


def name_of(folder: Path) -> str:
    """A name by which the checkpoint in a folder is loaded."""
    name = str(folder)
    head = registry.find_head(name)
    is_taken = name in specs.MODELS or (head and head.status != "planned")
    return f"local-dir:{name}" if is_taken else name


def _published(head: HeadEntry, is_optional: bool) -> Path | None:
    """The folder of a head of the zoo that is on the Hub; None if it is optional and the Hub has none."""
    from dcp_zoo.hub import is_absent  # slow to import

    try:
        return _download(*head.place)
    except ZooError as error:
        if is_optional and is_absent(error):
            return None
        if head.status != "planned":
            raise
        if is_absent(error):
            problem = (
                f"{head.name} is planned: nobody has published it, as the Hub has no public repo {head.place[0]}. "
                f"Train it: {head.train_command}. Heads that exist: dcp-zoo list."
            )
        else:
            problem = f"{head.name} may be on the Hub, but it cannot be had from there. {error}"
        raise ZooError(f"{problem} CLIP's weights without a head: {head.model}.clip, or pretrained='clip'.") from error


def _download(repo_id: str, revision: str | None, sha256: str | None = None) -> Path:
    """The folder of the checkpoint in a Hub repo; a warning names its commit, unless that is the
    `revision`."""
    from dcp_zoo.hub import download_head  # slow to import

    folder = download_head(repo_id, revision, sha256)
    commit = folder.name
    if commit != revision:
        warn(f"{repo_id} is not pinned: this is its commit {commit}. Pin it: hf-hub:{repo_id}@{commit}")
    return folder


def get_pretrained_cfg(name: str) -> Values:
    """timm's `pretrained_cfg` for a model or a head: input size, mean and std, crop, classes, licence,
    origin."""
    kind, place, tag = parse_name(name)
    if kind != "zoo":
        resolved = resolve(name, pretrained=False)
        return resolved.data_cfg | {"architecture": resolved.spec.name}
    spec = get_spec(place)
    if tag == CLIP_TAG:
        return registry.clip_cfg(spec)
    return get_head(f"{place}.{tag}" if tag else spec.default_head).pretrained_cfg


def get_pretrained_cfg_value(name: str, key: str) -> Any:
    """A value of `get_pretrained_cfg`; None if it has none of that name."""
    return get_pretrained_cfg(name).get(key)


def head_folder(name: str) -> Path:
    """The folder of a head's checkpoint, downloaded if needed; see `resolve`. ZooError for CLIP's own
    weights."""
    check_head(name)
    folder = resolve(name).folder
    assert folder is not None
    return folder


def check_head(name: str) -> None:
    """ZooError for the name of CLIP's own weights, whose prompts are fresh."""
    kind, _, tag = parse_name(name)
    if (kind, tag) == ("zoo", CLIP_TAG):
        raise ZooError(
            f"{name} is CLIP without a head, which answers nothing before it is trained: pass a head, such as one of "
            "dcp-zoo train --method zero-shot."
        )
