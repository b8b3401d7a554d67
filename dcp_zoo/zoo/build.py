"""From a `Resolved` name to a model: CLIP with its weights and tokenizer, a trained or a fresh head, and the
image encoders of timm that a head reads beside CLIP. The logger `dcp_zoo.zoo.build` tells at level INFO which
file, of which repository and revision, the weights of a head and of its CLIP come from."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.backbone.classes import TEMPLATE, Descriptions
from dcp_zoo.backbone.clip import FrozenCLIP, ImageEncoder
from dcp_zoo.backbone.mini import build_mini_clip
from dcp_zoo.backbone.tokens import Tokenizer
from dcp_zoo.data import classnames as dataset_classnames
from dcp_zoo.errors import ZooError, as_zoo_error, nearest_hint, warn, without_warnings
from dcp_zoo.fields import Values
from dcp_zoo.heads import file as head_file
from dcp_zoo.heads.config import WEIGHTS_NAME, Abilities, DCPConfig, without
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.heads.head import Head
from dcp_zoo.heads.kinds import AdapterHead, CacheHead, ConditionalHead, LinearHead, PromptHead
from dcp_zoo.hub import DOWNLOADS, fetch_clip, origin
from dcp_zoo.zoo.registry import clip_cfg
from dcp_zoo.zoo.resolve import Resolved
from dcp_zoo.zoo.specs import ModelSpec, described, get_spec

logger = logging.getLogger(__name__)
KINDS: Values = {kind.kind: kind for kind in (LinearHead, AdapterHead, PromptHead, ConditionalHead, CacheHead, DCP)}


# --- heads ---


def build_head(
    resolved: Resolved,
    classnames: Sequence[str] | None,
    descriptions: Descriptions | None,
    tokenizer: Tokenizer | None,
    options: Values,
) -> Head:
    """The head that a resolved name stands for, on its CLIP; a fresh DCP, for these classes, if it stands for none.
    For the arguments see `create_model`; ZooError for options of a DCP that the checkpoint does not have."""
    given = {name: value for name, value in options.items() if value is not None}
    config = _dcp_config(resolved, given)
    clip = load_clip(resolved.spec, resolved.pretrained is not False, tokenizer)
    clip.pretrained_cfg = resolved.data_cfg
    if resolved.folder and resolved.is_trained:
        head = trained_head(clip, resolved.folder)
        if classnames is not None or descriptions:
            head.set_classnames(head.classnames if classnames is None else classnames, descriptions)
        head.origin = resolved.head.pretrained_cfg if resolved.head else {}
        return head
    if resolved.folder and not resolved.pretrained:
        warn(f"Only the architecture is taken from {resolved.folder}: pass pretrained=True to load its weights.")
    texts = descriptions or TEMPLATE
    if classnames is not None:
        fresh = DCP(clip, classnames, config, texts=texts)
    else:
        if resolved.config:
            classnames = resolved.config["label_names"]
        else:
            classnames = dataset_classnames(resolved.head.dataset if resolved.head else "imagenet")
        with without_warnings():  # ImageNet's list has two pairs of classes with the same name
            fresh = DCP(clip, classnames, config, texts=texts)
    if resolved.head and resolved.pretrained:
        fresh.origin = clip_cfg(resolved.spec)
    return fresh


def _dcp_config(resolved: Resolved, options: Values) -> DCPConfig | None:
    """The options of a DCP, None for a trained head of another method."""
    if resolved.config is None:
        names = DCPConfig.__dataclass_fields__
        default = {name: value for name, value in resolved.spec.recipe.items() if name in names}
        return DCPConfig.from_options(default | options)
    method = resolved.config["dcp"]["method"]
    if resolved.config["dcp"]["head"] != "dcp":
        if options or not resolved.is_trained:
            raise ZooError(f"A head of {method} has no fresh prompts and no options: pass pretrained=True alone.")
        return None
    trained = DCPConfig.from_options(resolved.config["model_args"])
    if trained != DCPConfig.from_options(resolved.config["model_args"] | options):
        raise ZooError(
            f"The head in {resolved.folder} was trained with other options, {trained}: omit {', '.join(options)}."
        )
    return trained


def trained_head(clip: FrozenCLIP, folder: Path) -> Head:
    """The head of a checkpoint on this CLIP, with its weights."""
    config, state = head_file.read(folder)
    block = config["dcp"]
    with skip_init(), without_warnings():
        head: Head = KINDS[block["head"]].from_config(clip, config, state)
    head.method = block["method"]
    head.abilities = Abilities(**cast(Values, block["abilities"]))
    for stored in block.get("encoders", []):
        encoder = load_encoder(stored["name"], clip)
        encoder.check_weights(stored["fingerprint"], folder)
        head.image_encoders.append(encoder)
    head.from_state(config, state, folder)
    logger.info("Head of %s: %s", head.method, origin(folder / WEIGHTS_NAME))
    return head


# --- CLIP ---


def plain_clip(model: str, *, with_weights: bool = True) -> FrozenCLIP:
    """The CLIP of a model of the zoo such as "dcp_vitb16", with its weights, or random ones, which need no
    download; on the CPU."""
    return load_clip(get_spec(model), with_weights)


def load_clip(spec: ModelSpec, with_weights: bool, tokenizer: Tokenizer | None = None) -> FrozenCLIP:
    """The CLIP of a model's row with its weights, or random ones; see `create_model`."""
    tokenizer = tokenizer or build_tokenizer(spec)
    file = clip_file(spec) if with_weights else None
    clip = FrozenCLIP(build_clip(spec, file), tokenizer, spec.data_cfg, spec.name, spec.clip_pretrained)
    if file:
        logger.info("CLIP of %s: %s", spec.name, origin(file))
        commit = file.parent.name
        if spec.clip_revision not in (None, commit):
            clip.note = f"The pinned commit {spec.clip_revision} could not be had: CLIP's weights are of {commit}."
            warn(f"{clip.note} A head that was trained on others is refused.")
        clip.remember_weights()  # their fingerprint: a cast to another dtype must come after this
    return clip


def clip_file(spec: ModelSpec) -> Path:
    """The file with CLIP's weights, downloaded if needed, of the row's pinned revision if it has one, see
    `fetch_clip`."""
    if spec.clip is None:
        return MINI_WEIGHTS
    weights, _ = described(spec.clip, spec.clip_pretrained)
    if weights.get("hf_hub"):
        return fetch_clip(weights["hf_hub"], spec.clip_revision)
    return Path(open_clip.download_pretrained(weights, cache_dir=DOWNLOADS.get()))


def build_clip(spec: ModelSpec, file: Path | None) -> nn.Module:
    """CLIP itself, in float32, with the weights in a file or random ones; with QuickGELU for weights trained
    with it (such as OpenAI's)."""
    if spec.clip is None:
        return build_mini_clip(file)
    weights, config = described(spec.clip, spec.clip_pretrained)
    failed = f"open_clip cannot load {spec.clip}, or it is not a CLIP of images and texts: {{}}."
    if file:
        failed += f" If its weights are damaged, delete {file.resolve()}, and try again."
    with as_zoo_error(failed, Exception):
        with skip_init(file is not None):
            quick_gelu = weights.get("quick_gelu", config.get("quick_gelu", False))
            clip = build_open_clip(config, quick_gelu=bool(quick_gelu))
        if file:
            load_weights(clip, file)
    return clip.eval()


def build_open_clip(config: Values, quick_gelu: bool) -> nn.Module:
    """The CLIP of one of open_clip's model configs, with random weights: what `open_clip.create_model`
    chooses."""
    sizes = without(config, ("custom_text", "quick_gelu"))
    from_transformers = "hf_model_name" in sizes["text_cfg"]
    if from_transformers:  # the text tower's weights come with CLIP's
        sizes["text_cfg"] = sizes["text_cfg"] | {"hf_model_pretrained": False}
    if "multimodal_cfg" in sizes:
        kind = open_clip.CoCa
    elif config.get("custom_text", False) or from_transformers:
        kind = open_clip.CustomTextCLIP
    else:
        kind = open_clip.CLIP
    return kind(**sizes, quick_gelu=quick_gelu)


def load_weights(clip: nn.Module, path: Path) -> None:
    """Load CLIP's weights strictly. A safetensors file with exactly its tensors stays memory-mapped until
    used; open_clip's loader converts every other format it supports."""
    if path.suffix == ".safetensors":
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
        with suppress(RuntimeError):  # of other names or shapes
            clip.load_state_dict(state, assign=True)
            return
    open_clip.load_checkpoint(clip, str(path))


def build_tokenizer(spec: ModelSpec) -> Tokenizer | None:
    """The tokenizer of a model's text tower; None means open_clip's default."""
    if spec.clip is None:
        return None
    failed = (
        f"The tokenizer of {spec.clip} cannot be loaded: {{}}. If transformers is missing, pip install "
        "'dcp_zoo[tokenizers]'. Check the connection, or pass your own: create_model(..., tokenizer=...)."
    )
    with as_zoo_error(failed, Exception):  # `transformers` reports a missing file in many ways
        return open_clip.get_tokenizer(spec.clip, cache_dir=DOWNLOADS.get())


# --- image encoders ---


def check_encoders(names: Sequence[str]) -> None:
    """ZooError for a name that timm does not know."""
    for name in names:
        is_elsewhere = name.startswith(("hf-hub:", "local-dir:"))  # outside timm's registry
        if not is_elsewhere and not timm.is_model_pretrained(name):
            hint = nearest_hint(name, timm.list_models(pretrained=True))
            raise ZooError(
                f"timm has no pretrained image model {name!r}.{hint} All: timm.list_models(pretrained=True)."
            )


def load_encoder(name: str, clip: FrozenCLIP) -> ImageEncoder:
    """The image encoder of this name with its pretrained weights, on the device of a CLIP. ZooError for an
    unknown one, and for weights that are neither here nor can be downloaded."""
    failed = (
        f"The image encoder {name} cannot be loaded: {{}}. Its weights are downloaded once, by timm: connect to the "
        "internet, or choose another: timm.list_models(pretrained=True)."
    )
    with as_zoo_error(failed, Exception):
        size, options = _encoder_size(name, clip.pretrained_cfg["input_size"][1:])
        model = timm.create_model(name, pretrained=True, num_classes=0, **options)
    return ImageEncoder(model, name, size, clip).remember_weights().to(clip.device)


def _encoder_size(name: str, size: Sequence[int]) -> tuple[tuple[int, int], Values]:
    """The height and width that a model shall read, for images of this `size`, and timm's options for that.
    A model of any size reads `size`; one of a fixed size the next smaller multiple of its patches, or
    without patches its own."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    height, width = size
    if not model.pretrained_cfg.get("fixed_input_size"):
        return (height, width), {}
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple):
        return model.pretrained_cfg["input_size"][1:], {}
    fitting = (height // patch[0] * patch[0], width // patch[1] * patch[1])
    return fitting, {"img_size": fitting}
