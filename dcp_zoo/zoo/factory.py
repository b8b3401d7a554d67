"""From a name to a model and its image transform."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcp_zoo.data import classnames as dataset_classnames
from dcp_zoo.errors import ZooError
from dcp_zoo.model._init import skip_init
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.config import DCPConfig
from dcp_zoo.model.dcp import DCP, load_head
from dcp_zoo.model.linear_head import load_linear_head
from dcp_zoo.model.names import Descriptions
from dcp_zoo.zoo.clip import build_clip, build_tokenizer, check_tag
from dcp_zoo.zoo.models import weights_spec
from dcp_zoo.zoo.resolve import Source, get_pretrained_cfg, resolve


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
        name: a model ("dcp_vitb16"), a head ("dcp_vitb16.imagenet-16shot"), a checkpoint folder, or "local-dir:path" if
            it has the name of a model, "hf-hub:org/repo[@revision]". Any other CLIP: "open_clip:ARCH/TAG" as in
            `open_clip.list_pretrained()`, or "open_clip:hf-hub:org/repo".
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
        A `DCP` in training mode, as torch modules are: call `.eval()` to classify. For another method a `LinearHead`.

    Raises:
        ZooError: unknown names, a head that has not been trained yet, a checkpoint that does not fit, options that
            contradict the head.
    """
    source = resolve(name, pretrained, cache_dir)
    config, spec = _dcp_config(source, options, clip_pretrained), source.spec
    clip_tag = check_tag(spec, clip_pretrained or source.clip_tag)
    tokenizer = tokenizer or build_tokenizer(spec, cache_dir)
    clip = build_clip(spec, clip_tag, with_weights=bool(pretrained), cache_dir=cache_dir)
    load = source.folder if pretrained else None
    with skip_init(load is not None), warnings.catch_warnings():
        if classnames is None:  # ImageNet's list has two pairs of classes with the same name
            warnings.filterwarnings("ignore", message="Repeated class names")
        model = _build_model(clip, source, config, classnames, descriptions, tokenizer)
    model.architecture, model.clip_source, model.info = spec.name, clip_tag, source.info
    if source.config:
        model.measured_classes = sorted(source.config["label_names"])
    cfg = source.head.pretrained_cfg if source.head and source.folder else {}
    cfg |= weights_spec(spec, clip_tag).data_cfg | {"architecture": spec.name}
    model.pretrained_cfg = model.default_cfg = cfg | {"num_classes": model.num_classes, "label_names": model.classnames}
    if load and config:
        load_head(model, load, source.config)
    elif source.folder and not load:
        warnings.warn(
            f"Only the architecture is taken from {source.folder}: pass pretrained=True to load its weights.",
            stacklevel=2,
        )
    model.stats = stats
    return model


def _dcp_config(source: Source, options: dict[str, Any], clip_pretrained: str | None) -> DCPConfig | None:
    """The options of a DCP, None for the head of another method; ZooError if some contradict the checkpoint."""
    options = {name: value for name, value in options.items() if value is not None}
    if source.folder is None or source.config is None:
        return DCPConfig.from_options(options)
    if method := source.info.get("method"):
        if options or clip_pretrained:
            raise ZooError(f"A head of {method} has no options: omit {', '.join(options) or 'them'}.")
        return None
    trained = DCPConfig.from_options(source.config["model_args"])
    DCPConfig.from_options(trained.as_dict() | options)  # raises for unknown ones
    if clip_pretrained:
        options["clip_pretrained"] = check_tag(source.spec, clip_pretrained)
    values = trained.as_dict() | {"clip_pretrained": source.clip_tag}
    differ = [f"{k}={values[k]!r}, not {v!r}" for k, v in options.items() if values[k] != v]
    if differ:
        raise ZooError(f"The head {source.folder.name} was trained with {'; '.join(differ)}. Omit these options.")
    return trained


def _build_model(
    clip: nn.Module,
    source: Source,
    config: DCPConfig | None,
    classnames: Sequence[str] | None,
    descriptions: Descriptions | None,
    tokenizer: Any,
) -> Any:
    """The model around a CLIP: a DCP without its weights, or the head of another method with them."""
    if config is None:
        assert source.folder is not None
        head = load_linear_head(clip, source.folder, tokenizer, source.config)
        if classnames is not None or descriptions:
            head.set_classnames(classnames or head.classnames, descriptions)
        return head
    if source.config:
        names = source.config["label_names"]
    else:
        names = dataset_classnames(source.head.dataset if source.head else "imagenet")
    return DCP(clip, classnames or names, config, tokenizer=tokenizer, descriptions=descriptions)


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
