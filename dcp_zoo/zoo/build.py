"""From what a name stands for to a model: CLIP with its weights and tokenizer, a trained or a fresh head, and the image
encoders of timm that a head reads beside CLIP."""

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.backbone.classes import TEMPLATE, Descriptions
from dcp_zoo.backbone.clip import FrozenCLIP, ImageEncoder
from dcp_zoo.backbone.mini import build_mini_clip
from dcp_zoo.backbone.tokens import Tokenizer
from dcp_zoo.data import classnames as dataset_classnames
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra, nearest_hint, warn
from dcp_zoo.fields import Values
from dcp_zoo.heads.checkpoint import load, read_tensors
from dcp_zoo.heads.config import Abilities, DCPConfig
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.heads.head import Head
from dcp_zoo.heads.kinds import CacheHead, LinearHead, PromptHead
from dcp_zoo.hub import fetch_clip
from dcp_zoo.zoo.registry import OPEN_CLIP, ModelSpec, described
from dcp_zoo.zoo.resolve import Source, resolve

KINDS: Values = {kind.kind: kind for kind in (LinearHead, PromptHead, CacheHead, DCP)}


# --- heads ---


def build_head(
    source: Source,
    classnames: Sequence[str] | None,
    descriptions: Descriptions | None,
    tokenizer: Tokenizer | None,
    options: Values,
) -> Head:
    """The head that a source stands for, on its CLIP; a fresh DCP, for these classes, if it stands for none. For the
    arguments see `create_model`; ZooError for options of a DCP that the checkpoint does not have."""
    config = _dcp_config(source, {name: value for name, value in options.items() if value is not None})
    clip = load_clip(source.spec, source.pretrained is not False, tokenizer, source.cache_dir)
    if source.is_trained:
        head = trained_head(clip, source)
        if classnames is not None or descriptions:
            head.set_classnames(head.classnames if classnames is None else classnames, descriptions)
        head.origin = source.head.pretrained_cfg if source.head else {}
        return head
    if source.folder and not source.pretrained:
        warn(f"Only the architecture is taken from {source.folder}: pass pretrained=True to load its weights.")
    stored = source.config["label_names"] if source.config else None
    names = classnames or stored or dataset_classnames(source.head.dataset if source.head else "imagenet")
    with warnings.catch_warnings():
        if classnames is None:  # ImageNet's list has two pairs of classes with the same name
            warnings.filterwarnings("ignore", message="Repeated class names")
        return DCP(clip, names, config, texts=descriptions or TEMPLATE)


def _dcp_config(source: Source, options: Values) -> DCPConfig | None:
    """The options of a DCP, None for a trained head of another method."""
    if source.config is None:
        return DCPConfig.from_options(source.spec.dcp_options | options)
    method, values = source.config["dcp"]["method"], source.config["model_args"]
    if source.config["dcp"]["head"] != "dcp":
        if not source.is_trained:
            made = f"{source.folder} is a head of {method}, which has no fresh prompts"
            raise ZooError(f"{made}: pass pretrained=True for its weights.")
        if options:
            raise ZooError(f"A head of {method} has no options: omit {', '.join(options)}.")
        return None
    trained = DCPConfig.from_options(values)
    asked = DCPConfig.from_options(values | options).as_dict()
    if differ := [f"{k}={v!r}, not {asked[k]!r}" for k, v in trained.as_dict().items() if v != asked[k]]:
        raise ZooError(
            f"The head {Path(source.folder or '').name} was trained with {'; '.join(differ)}. Omit these options."
        )
    return trained


def trained_head(clip: FrozenCLIP, source: Source) -> Head:
    """The head of a checkpoint on this CLIP, with its weights."""
    assert source.folder is not None
    assert source.config is not None
    block = source.config["dcp"]
    state = read_tensors(source.folder, source.config["weights_sha256"])
    with skip_init(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Repeated class names")
        head: Head = KINDS[block["head"]].from_config(clip, source.config, state)
    head.method, head.abilities = block["method"], Abilities(**cast(Values, block["abilities"]))
    stored = block.get("encoders", [])
    head.image_encoders.extend(load_encoders([said["name"] for said in stored], clip, stored))
    return load(head, source.folder, source.config, state)


# --- CLIP ---


def plain_clip(model: str, *, with_weights: bool = True) -> FrozenCLIP:
    """The CLIP of a model of the zoo such as "dcp_vitb16", with its weights, or random ones, which need no download; on
    the CPU."""
    return load_clip(resolve(model, "clip").spec, with_weights)


def load_clip(
    spec: ModelSpec, with_weights: bool, tokenizer: Tokenizer | None = None, cache_dir: str | Path | None = None
) -> FrozenCLIP:
    """The CLIP of a model's row with its weights, or random ones; see `create_model`."""
    tokenizer = tokenizer or build_tokenizer(spec, cache_dir)
    built = build_clip(spec, with_weights, cache_dir)
    clip = FrozenCLIP(built, tokenizer, spec.data_cfg, spec.name, spec.clip_pretrained)
    return clip.remember_weights() if with_weights else clip


def build_clip(spec: ModelSpec, with_weights: bool, cache_dir: str | Path | None = None) -> nn.Module:
    """CLIP itself, in float32, with QuickGELU for weights trained with it (such as OpenAI's)."""
    if spec.clip is None:
        return build_mini_clip(MINI_WEIGHTS if with_weights else None)
    source, config = described(spec.clip, spec.clip_pretrained, cache_dir)
    file = _weights_file(spec, source, cache_dir) if with_weights else ""
    repo = source.get("hf_hub", "").rpartition("/")[0]
    failed = (
        f"open_clip cannot load the {spec.clip_pretrained} weights of {spec.clip}: {{}}. If they are damaged, "
        f"{f'hf cache rm model/{repo}' if repo else 'replace them'}, and try again. Other weights are other models: "
        "open_clip:ARCH/TAG."
    )
    other = f"{spec.clip} is not a CLIP of images and texts that dcp_zoo can build: {{}}. Choose another."
    with as_zoo_error(failed, RuntimeError, SafetensorError, FileNotFoundError):
        with as_zoo_error(other, TypeError, ValueError), skip_init(with_weights):
            clip = build_open_clip(config, quick_gelu=bool(source.get("quick_gelu", config.get("quick_gelu", False))))
        if with_weights:
            load_weights(clip, file)
    return clip.eval()


def _weights_file(spec: ModelSpec, source: Values, cache_dir: str | Path | None) -> str | Path:
    """The file with CLIP's weights, downloaded if needed, from the row's pinned revision if it has one; `source` is
    open_clip's description of it. ZooError if open_clip has moved the weights to another repo."""
    if not (place := source.get("hf_hub")):
        return open_clip.download_pretrained(source, cache_dir=cache_dir and str(cache_dir))
    repo = place.rpartition("/")[0]
    advice = f"Upgrade dcp_zoo, or take the weights as they are now: {OPEN_CLIP}{spec.clip}/{spec.clip_pretrained}."
    if spec.clip_revision and repo != spec.clip_repo:
        moved = (
            f"open_clip {version('open_clip_torch')} has the {spec.clip_pretrained} weights of {spec.clip} in {repo}"
        )
        raise ZooError(f"{moved}, and {spec.name} has them from {spec.clip_repo}. {advice}")
    return fetch_clip(place, cache_dir, spec.clip_revision, advice)


def build_open_clip(config: Values, quick_gelu: bool) -> nn.Module:
    """The CLIP of one of open_clip's model configs, with random weights: what `open_clip.create_model` chooses."""
    custom = config.get("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:  # its weights come with CLIP's
        config = config | {"text_cfg": config["text_cfg"] | {"hf_model_pretrained": False}}
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    sizes = {name: value for name, value in config.items() if name not in ("custom_text", "quick_gelu")}
    return kind(**sizes, quick_gelu=quick_gelu)


def load_weights(clip: nn.Module, path: str | Path) -> None:
    """Load CLIP's weights strictly. A safetensors file with exactly its tensors stays memory-mapped until used;
    open_clip's loader converts every other format it supports."""
    if Path(path).suffix == ".safetensors":
        state = load_file(path)
        if {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in clip.state_dict().items()}:
            clip.load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
            return
    open_clip.load_checkpoint(clip, str(path))


def build_tokenizer(spec: ModelSpec, cache_dir: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer of a model's text tower; None means open_clip's default."""
    if spec.clip is None:
        return None
    try:
        return open_clip.get_tokenizer(spec.clip, cache_dir=cache_dir and str(cache_dir))
    except Exception as error:  # of `transformers`, which reports a missing file in many ways
        text_cfg = described(spec.clip, spec.clip_pretrained, cache_dir)[1].get("text_cfg", {})
        wanted = text_cfg.get("hf_tokenizer_name", spec.clip)
        import_extra("transformers", "tokenizers")
        problem = f"The tokenizer of {spec.clip} cannot be loaded from the Hub repo {wanted!r}: {error}."
        advice = "Check the connection, or pass your own: create_model(..., tokenizer=...)."
        raise ZooError(f"{problem} {advice}") from error


# --- image encoders ---

PLACES = ("hf-hub:", "local-dir:")  # timm's names for other places of a model


def load_encoders(names: Sequence[str], clip: FrozenCLIP, stored: Sequence[Values] = ()) -> list[ImageEncoder]:
    """The image encoders of these names with their pretrained weights, on the device of a CLIP; `stored` is what a head
    says of each. ZooError for an unknown one, weights that are neither here nor can be downloaded, or others than the
    head was trained with."""
    check_encoders(names)
    encoders = [_load_encoder(name, clip) for name in names]
    for encoder, said in zip(encoders, stored, strict=False):
        if said["fingerprint"] != encoder.fingerprint():
            problem = f"The weights of {encoder.source} are not those that the head was trained with"
            raise ZooError(f"{problem}: use the version of timm that it names, or train the head again.")
    return encoders


def check_encoders(names: Sequence[str]) -> None:
    """ZooError for a name that timm does not know."""
    for name in names:
        if not name.startswith(PLACES) and not timm.is_model_pretrained(name):
            hint = nearest_hint(name, timm.list_models(pretrained=True))
            advice = "All: timm.list_models(pretrained=True)"
            raise ZooError(f"timm has no pretrained image model {name!r}.{hint} {advice}.")


def _load_encoder(name: str, clip: FrozenCLIP) -> ImageEncoder:
    failed = (
        f"The image encoder {name} cannot be loaded: {{}}. Its weights are downloaded once, by timm: connect to the "
        "internet, or choose another: timm.list_models(pretrained=True)."
    )
    with as_zoo_error(failed, Exception):
        size, options = _size(name, clip.pretrained_cfg["input_size"][1:])
        model = timm.create_model(name, pretrained=True, num_classes=0, **options)
    return ImageEncoder(model, name, size, clip).remember_weights().to(clip.device)


def _size(name: str, size: Sequence[int]) -> tuple[tuple[int, int], Values]:
    """The pixels that a model shall read, for images of this size, and timm's options for it: this size, where the
    model has a fixed one a multiple of its patches, or its own where it has no patches."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    height, width = size
    if not model.pretrained_cfg.get("fixed_input_size"):
        return (height, width), {}
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple):
        own: tuple[int, int] = model.pretrained_cfg["input_size"][1:]
        return own, {}
    fitting = height // patch[0] * patch[0], width // patch[1] * patch[1]
    return fitting, {"img_size": fitting}
