"""From a name to a model and its image transform."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dcp_zoo.data import classnames as dataset_classnames
from dcp_zoo.errors import ZooError
from dcp_zoo.model._init import skip_init
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.config import DCPConfig
from dcp_zoo.model.config_file import is_checkpoint, read_config
from dcp_zoo.model.dcp import DCP, load_head
from dcp_zoo.model.linear_head import load_linear_head
from dcp_zoo.model.names import Descriptions
from dcp_zoo.zoo.clip import build_clip, build_tokenizer, check_tag
from dcp_zoo.zoo.locate import head_folder
from dcp_zoo.zoo.models import is_open_clip, weights_spec
from dcp_zoo.zoo.registry import ModelSpec, data_cfg, get_head, get_pretrained_cfg, get_spec, is_model


def create_model(
    name: str,
    pretrained: bool | str = False,
    *,
    classnames: Sequence[str] | None = None,
    descriptions: Descriptions | None = None,
    clip_pretrained: str | None = None,
    stats: str | None = None,
    tokenizer: Callable[..., torch.Tensor] | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Any:
    """Create a model of the zoo.

    Args:
        name: a model ("dcp_vitb16"), a head ("dcp_vitb16.imagenet-16shot"), the path of a checkpoint folder,
            "hf-hub:org/repo[@revision]", or "local-dir:path" for a folder that has the name of a model. Any other
            CLIP: "open_clip:ARCH/TAG" as in `open_clip.list_pretrained()`, or "open_clip:hf-hub:org/repo".
        pretrained: False for random weights (nothing is downloaded, as in timm), "clip" for CLIP's weights and fresh
            prompts, a tag such as "imagenet-16shot" for CLIP's weights and that head, True for the head in `name` or
            the model's default one.
        classnames: the classes to classify into. Default: those of the head, or of the model's default head.
        descriptions: sentences of each class, in place of its name, see `DCP.set_classnames`. Default: those of the
            head, if it has some.
        clip_pretrained: another open_clip tag for CLIP's weights. Default: OpenAI's.
        stats: see `DCP.stats`.
        tokenizer: of CLIP's text tower. Default: the one open_clip names for it, which may be downloaded.
        cache_dir: where downloads are kept. Default: the Hub client's cache.
        **options: of `DCPConfig`: n_ctx, depth, pooling, share_cmpa, coupling, ctx_init. A head has its own values.

    Returns:
        A `DCP` in training mode, as torch modules are by default: call `.eval()` to classify. For a head of another
        method a `LinearHead`.

    Raises:
        ZooError: unknown names, a head that has not been trained yet, a checkpoint that does not fit, options that
            contradict the head.
    """
    source = resolve(name, pretrained, cache_dir)
    if options or clip_pretrained:
        source = _with_options(source, {k: v for k, v in options.items() if v is not None}, clip_pretrained)
    tokenizer = tokenizer or build_tokenizer(source.spec, cache_dir)
    clip = build_clip(source.spec, source.clip_tag, with_weights=bool(pretrained), cache_dir=cache_dir)
    load = source.folder if pretrained else None
    with skip_init(load is not None), warnings.catch_warnings():
        if classnames is None:  # ImageNet's list has two pairs of classes with the same name
            warnings.filterwarnings("ignore", message="Repeated class names")
        model = build(source, clip, classnames, tokenizer, descriptions)
    model.architecture, model.clip_source, model.info = source.spec.name, source.clip_tag, dict(source.info)
    model.pretrained_cfg = model.default_cfg = {
        **source.origin,
        **data_cfg(weights_spec(source.spec, source.clip_tag)),
        "architecture": source.spec.name,
        "num_classes": model.num_classes,
        "label_names": model.classnames,
    }
    if load and isinstance(model, DCP):
        load_head(model, load)
    elif source.folder and not load:
        warnings.warn(
            f"Only the architecture is taken from {source.folder}: pass pretrained=True to load its weights.",
            stacklevel=2,
        )
    model.stats = stats
    return model


def build(
    source: "Source",
    clip: Any,
    classnames: Sequence[str] | None,
    tokenizer: Any,
    descriptions: Descriptions | None = None,
) -> Any:
    """The model around a CLIP: a DCP without its weights, or the head of another method."""
    if source.config is not None:
        names = classnames or source.classnames
        return DCP(clip, names, source.config, tokenizer=tokenizer, descriptions=descriptions)
    assert source.folder is not None
    head = load_linear_head(clip, source.folder, tokenizer)
    if classnames is not None or descriptions:
        head.set_classnames(classnames or head.classnames, descriptions)
    return head


class Source(NamedTuple):
    """What a model name resolves to.

    Attributes:
        config: DCP's options; None for the head of another method.
        folder: of the checkpoint; None for fresh prompts.
        info: what the checkpoint stores about its training.
        origin: timm's pretrained_cfg of a registered head.
    """

    spec: ModelSpec
    config: DCPConfig | None
    clip_tag: str
    classnames: list[str]
    folder: Path | None = None
    info: dict[str, Any] = {}
    origin: dict[str, Any] = {}


def resolve(name: str, pretrained: bool | str, cache_dir: str | Path | None = None) -> Source:
    """Resolve a model name; a head is looked up in the package, in the local cache and on the Hub.

    Raises:
        ZooError: unknown names, or a checkpoint that is missing, damaged or built on a CLIP unknown to the zoo.
    """
    if is_open_clip(name):
        if pretrained not in (False, "clip"):
            raise ZooError(f"{name} has no heads: pass pretrained='clip' for CLIP's weights and fresh prompts.")
        spec = get_spec(name)
        return Source(spec, DCPConfig(), spec.clip_pretrained, dataset_classnames("imagenet"))
    if ":" in name or (not is_model(name) and is_checkpoint(name)):
        return _read(head_folder(name, cache_dir))
    model, _, tag = name.partition(".")
    spec = get_spec(model)
    if isinstance(pretrained, str) and tag and pretrained != tag:
        raise ZooError(f"{name!r} names the head {tag!r}, but pretrained={pretrained!r} another: pass only one.")
    named = get_head(f"{model}.{tag or spec.default_tag}")
    if not pretrained or pretrained == "clip":
        return Source(spec, DCPConfig(), spec.clip_pretrained, dataset_classnames(named.dataset))
    head = named if pretrained is True else get_head(f"{model}.{pretrained}")
    return _read(head_folder(head.name, cache_dir), get_pretrained_cfg(head.name))


def _read(folder: Path, origin: dict[str, Any] | None = None) -> Source:
    """The checkpoint in a folder."""
    config = read_config(folder)
    if config["architecture"] == "custom":
        raise ZooError(
            f"The head in {folder} was trained on a CLIP outside the zoo. Build model = dcp_zoo.DCP(clip, classnames, "
            f"...) around that CLIP, then call dcp_zoo.load_head(model, {str(folder)!r})."
        )
    info = {k: v for k, v in config["dcp"].items() if k not in ("format_version", "clip", "versions", "descriptions")}
    options = None if "method" in info else DCPConfig.from_options(config["model_args"])
    spec = get_spec(config["architecture"])
    tag = check_tag(spec, config["dcp"]["clip"])
    return Source(spec, options, tag, config["label_names"], folder, info, origin or {})


def _with_options(source: Source, options: dict[str, Any], clip_pretrained: str | None) -> Source:
    """The source with other options; ZooError if they contradict its checkpoint."""
    if source.config is None:
        raise ZooError(f"A head of {source.info['method']} has no options: omit {', '.join(options) or 'them'}.")
    config = DCPConfig.from_options(source.config.as_dict() | options)
    tag = check_tag(source.spec, clip_pretrained or source.clip_tag)
    if source.folder:
        trained = source.config.as_dict() | {"clip_pretrained": source.clip_tag}
        requested = options | {"clip_pretrained": tag}
        differ = [f"{k}={trained[k]!r}, not {v!r}" for k, v in requested.items() if trained[k] != v]
        if differ:
            raise ZooError(f"The head {source.folder.name} was trained with {'; '.join(differ)}. Omit these options.")
    return source._replace(config=config, clip_tag=tag)


def create_transform(model_or_name: FrozenCLIP | str, is_training: bool = False) -> Callable[[Any], torch.Tensor]:
    """PIL image -> normalised tensor (3, H, W).

    Testing: the CLIP's own, bit for bit: resize of the short side and centre crop, or for some of both sides.
    Training: random resized crop (8 to 100 % of the area) and horizontal flip, as in the DCP release, with torch's
    random numbers. It accepts uint8 tensors (3, h, w) too and works on those: faster than PIL, and within 2 of 255
    levels of it.
    """
    cfg = get_pretrained_cfg(model_or_name) if isinstance(model_or_name, str) else model_or_name.pretrained_cfg
    if is_training:
        return _training_transform(cfg)
    from timm.data import create_transform as timm_transform

    options: dict[str, Any] = {k: cfg[k] for k in ("input_size", "interpolation", "mean", "std")}
    return timm_transform(is_training=False, crop_pct=cfg["crop_pct"], crop_mode=cfg["crop_mode"], **options)


def _training_transform(cfg: dict[str, Any]) -> Callable[[Any], torch.Tensor]:
    from torchvision.transforms import v2

    resample = v2.InterpolationMode(cfg["interpolation"])
    return v2.Compose(
        [
            v2.PILToTensor(),  # leaves tensors alone
            v2.RandomResizedCrop(cfg["input_size"][1:], scale=(0.08, 1.0), interpolation=resample, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(cfg["mean"], cfg["std"], inplace=True),  # on the new float tensor
        ]
    )
