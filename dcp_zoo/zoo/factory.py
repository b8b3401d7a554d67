"""From a name to a model and its image transform."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from dcp_zoo.errors import ZooError
from dcp_zoo.model._init import load_clip, skip_init
from dcp_zoo.model.checkpoint import ARCHITECTURE_ARGS, load_head, read_config
from dcp_zoo.model.dcp import DCP
from dcp_zoo.zoo.hub import download_head, download_registered, fetch_clip
from dcp_zoo.zoo.registry import Head, ModelSpec, data_cfg, get_head, get_pretrained_cfg, get_spec


def create_model(
    name: str,
    pretrained: bool | str = False,
    *,
    classnames: Sequence[str] | None = None,
    clip_pretrained: str | None = None,
    coupling: str | None = None,
    context: str | None = None,
    n_ctx: int | None = None,
    depth: int | None = None,
    fusing: str | None = None,
    shared: bool | None = None,
    ctx_init: str | None = None,
    cache_dir: str | Path | None = None,
) -> DCP:
    """Create a model of the zoo.

    Args:
        name: a model ("dcp_vitb16"), a head ("dcp_vitb16.imagenet-16shot"), "hf-hub:org/repo[@revision]" or
            "local-dir:path" for a checkpoint elsewhere.
        pretrained: False for random weights (nothing is downloaded, as in timm), "clip" for CLIP's weights and fresh
            prompts, a tag such as "imagenet-16shot" for CLIP's weights and that head, True for the head in `name` or
            the model's default one.
        classnames: the classes to tell apart. Default: those of the head, or of the model's default head.
        clip_pretrained: another open_clip tag for CLIP's weights. Default: OpenAI's.
        coupling, n_ctx, depth, fusing, shared, ctx_init: see `DCP`. A head brings its own.
        context: see `DCP.context`.
        cache_dir: where downloads are kept. Default: the Hub client's cache.

    Returns:
        The model in training mode, as torch modules are; call `.eval()` to classify.

    Raises:
        ZooError: unknown names, a head that nobody has trained yet, a checkpoint that does not fit, arguments that
            contradict the head.
    """
    args: dict[str, Any] = {"coupling": coupling, "n_ctx": n_ctx, "depth": depth, "fusing": fusing, "shared": shared}
    given = {k: v for k, v in args.items() if v is not None}
    source = find_head(name, pretrained, cache_dir)
    if not isinstance(source, ModelSpec):
        model = _load(source, given, classnames, clip_pretrained, cache_dir, with_weights=bool(pretrained))
    else:
        clip_source = _clip_source(source, clip_pretrained)
        clip = build_clip(source, clip_source, with_weights=pretrained == "clip", cache_dir=cache_dir)
        classnames = classnames or _default_classnames(name, source)
        model = DCP(clip, classnames, tokenizer=_tokenizer(source), ctx_init=ctx_init, **given)
        _describe(model, source, clip_source, {})
    model.context = context
    return model


def find_head(name: str, pretrained: bool | str, cache_dir: str | Path | None = None) -> Path | Head | ModelSpec:
    """What a name asks for: a checkpoint folder (`hf-hub:`, `local-dir:`), a registered head, or a model without."""
    kind, _, place = name.partition(":")
    if place:
        if kind == "local-dir":
            return Path(place)
        if kind == "hf-hub":
            repo_id, _, revision = place.partition("@")
            return download_head(repo_id, revision or None, cache_dir=cache_dir)
        raise ZooError(f"Unknown source {kind!r} in {name!r}: use hf-hub:org/repo[@revision] or local-dir:path.")
    model, _, tag = name.partition(".")
    spec = get_spec(model)
    if isinstance(pretrained, str) and tag and pretrained != tag:
        raise ZooError(f"{name!r} names the head {tag!r} and pretrained={pretrained!r} another: give only one.")
    if tag:
        get_head(name)
    if not pretrained or pretrained == "clip":
        return spec
    return get_head(f"{model}.{(pretrained if isinstance(pretrained, str) else tag) or spec.default_tag}")


def _load(
    source: Path | Head,
    given: dict[str, Any],
    classnames: Sequence[str] | None,
    clip_pretrained: str | None,
    cache_dir: str | Path | None,
    with_weights: bool,
) -> DCP:
    """The model of a checkpoint folder or a registered head, which is in the package, the local cache or on the Hub.

    Arguments may repeat what the checkpoint says, not contradict it.
    """
    if isinstance(source, Path):
        folder, origin = source, {}
    else:
        folder = source.bundled_dir if source.status == "bundled" else download_registered(source, cache_dir)
        origin = get_pretrained_cfg(source.name)
    config = read_config(folder)
    if config["architecture"] == "custom":
        raise ZooError(
            f"The head in {folder} belongs to a CLIP of its own: build model = dcp_zoo.DCP(clip, classnames, ...) "
            f"around that CLIP and call dcp_zoo.load_head(model, {str(folder)!r})."
        )
    info, spec = config["dcp"], get_spec(config["architecture"])
    clip_source = _clip_source(spec, info["clip"])
    asked = given if clip_pretrained is None else given | {"clip_pretrained": clip_pretrained}
    trained = {k: info[k] for k in ARCHITECTURE_ARGS} | {"clip_pretrained": clip_source}
    differ = [f"{k}={trained[k]!r}, not {v!r}" for k, v in asked.items() if trained[k] != v]
    if differ:
        raise ZooError(f"The head {folder.name} was trained with {'; '.join(differ)}. Leave these arguments out.")
    clip = build_clip(spec, clip_source, with_weights=with_weights, cache_dir=cache_dir)
    args = {k: info[k] for k in ARCHITECTURE_ARGS}
    with skip_init(with_weights):
        model = DCP(clip, classnames or config["label_names"], tokenizer=_tokenizer(spec), **args)
    _describe(model, spec, clip_source, origin)
    model.info = {k: v for k, v in info.items() if k not in (*args, "format_version", "clip", "versions")}
    if with_weights:
        return load_head(model, folder)
    warnings.warn(f"{folder} gives only the architecture here: pass pretrained=True to load its weights.", stacklevel=3)
    return model


def _describe(model: DCP, spec: ModelSpec, clip_source: str, origin: dict[str, Any]) -> None:
    """Tell the model what it is, for checkpoints and for timm; `origin` is the registry's cfg of the head in it."""
    model.architecture, model.clip_source = spec.name, clip_source
    model.pretrained_cfg = model.default_cfg = {
        **origin,
        **data_cfg(spec),
        "architecture": spec.name,
        "num_classes": model.num_classes,
        "label_names": model.classnames,
    }


def _clip_source(spec: ModelSpec, clip_pretrained: str | None) -> str:
    """The tag of CLIP's weights, checked against what open_clip has for the model."""
    tag = clip_pretrained or spec.clip_pretrained
    if spec.clip is None:
        valid = [spec.clip_pretrained]
    else:
        import open_clip

        valid = open_clip.list_pretrained_tags_by_model(spec.clip)
    if tag not in valid:
        raise ZooError(f"{spec.name} has no CLIP weights {tag!r}: choose from {', '.join(valid)}.")
    return tag


def build_clip(
    spec: ModelSpec, clip_source: str, *, with_weights: bool, cache_dir: str | Path | None = None
) -> nn.Module:
    """CLIP itself, in float32. Weights that were trained with QuickGELU (OpenAI's) run with it."""
    if spec.clip is None:
        from dcp_zoo.model.mini import MINI_WEIGHTS, build_mini_clip

        return build_mini_clip(MINI_WEIGHTS if with_weights else None)
    import open_clip

    source = open_clip.get_pretrained_cfg(spec.clip, clip_source)
    quick_gelu = bool(source.get("quick_gelu", False))
    if with_weights and source.get("hf_hub"):
        fetch_clip(source["hf_hub"], cache_dir)
    try:
        with skip_init(with_weights):
            clip = open_clip.CLIP(**open_clip.get_model_config(spec.clip), quick_gelu=quick_gelu)
        if with_weights:
            load_clip(clip, open_clip.download_pretrained(source, cache_dir=str(cache_dir) if cache_dir else None))
    except (RuntimeError, SafetensorError) as error:
        raise ZooError(
            f"open_clip cannot load the {clip_source} weights of {spec.clip}: {error}. If a file is named, delete it "
            "and try again; other weights: clip_pretrained=TAG."
        ) from error
    uses = {type(block.mlp.gelu).__name__ for block in clip.visual.transformer.resblocks}
    if uses != {"QuickGELU" if quick_gelu else "GELU"}:
        raise RuntimeError(
            f"open_clip built {spec.clip} with {uses}, but {clip_source} weights need QuickGELU={quick_gelu}"
        )
    return clip


def _tokenizer(spec: ModelSpec) -> Callable[..., torch.Tensor] | None:
    if spec.clip is None:
        return None
    import open_clip

    return open_clip.get_tokenizer(spec.clip)


def _default_classnames(name: str, spec: ModelSpec) -> list[str]:
    from dcp_zoo.data import classnames

    return classnames(get_head(name if "." in name else f"{name}.{spec.default_tag}").dataset)


def create_transform(model_or_name: DCP | str, is_training: bool = False) -> Callable[[Any], torch.Tensor]:
    """PIL image -> normalised tensor (3, H, W).

    Testing: bicubic resize of the short side and centre crop, bit for bit CLIP's own. Training: bicubic random
    resized crop (8 to 100 % of the area) and horizontal flip, as the DCP release does, with torch's random numbers. It
    takes uint8 tensors (3, h, w) too, and works on these: faster than PIL, and within 2 of 255 levels of it.
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
            v2.Normalize(cfg["mean"], cfg["std"], inplace=True),  # of the floats just made
        ]
    )
