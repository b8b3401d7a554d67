"""The two factories of the zoo: a name becomes a model, or an image transform.

`create_model` takes three steps: `resolve` finds what the name stands for, `build_head` makes that, and what
follows changes it as `timm.create_model` would.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import load_checkpoint
from timm.models._features import FeatureGetterNet

from dcp_zoo.backbone.classes import Descriptions
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.preprocessing import PREPROCESSING
from dcp_zoo.backbone.tokens import Tokenizer
from dcp_zoo.backbone.towers import FORMATS, take_blocks
from dcp_zoo.data.images import crop, normalise
from dcp_zoo.errors import ZooError, as_zoo_error, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import without
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head import Head
from dcp_zoo.hub import downloads_in
from dcp_zoo.zoo.build import build_head
from dcp_zoo.zoo.registry import CLIP_TAG
from dcp_zoo.zoo.resolve import get_pretrained_cfg, resolve
from dcp_zoo.zoo.specs import ModelSpec


def create_model(
    model_name: str,
    pretrained: bool | str = False,
    *,
    classnames: Sequence[str] | None = None,
    descriptions: Descriptions | None = None,
    stats: str | None = None,
    classifier: str | None = None,
    tokenizer: Tokenizer | None = None,
    cache_dir: str | Path | None = None,
    num_classes: int | None = None,
    checkpoint_path: str | Path = "",
    features_only: bool = False,
    feature_cls: str | None = None,
    out_indices: int | Sequence[int] | None = None,
    output_fmt: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Create a model of the zoo.

    Args:
        model_name: a model ("dcp_vitb16", or "small", "medium", "large": the best for their cost), a head
            ("dcp_vitb16.imagenet-16shot"), CLIP's own weights ("dcp_vitb16.clip"), a checkpoint folder, or
            "local-dir:path" if it has the name of a model, "hf-hub:org/repo[@revision]". Any other CLIP:
            "open_clip:ARCH/TAG" as in `open_clip.list_pretrained()`, or "open_clip:hf-hub:org/repo".
        pretrained: False for random weights (nothing is downloaded, as in timm), "clip" for CLIP's weights
            and fresh prompts, a tag such as "imagenet-16shot" of a model of the zoo for CLIP's weights and
            that head, True for what `model_name` names, of a model its default head. If that is not
            published, and `num_classes` or `features_only` leave its classifier out, True is "clip", with a
            warning. Random weights and fresh prompts are drawn from torch's random state, as those of any
            torch module.
        classnames: the classes to classify into. Default: the classes of the head, or of the model's default
            head.
        descriptions: sentences of each class, in place of its name. Default: the head's, if it has some.
        stats: "stored" or "batch", see `DCP.stats`. Default: stored, if the head has these.
        classifier: "none" leaves out the text probe of a head, as in the papers. Default: with it, if it has
            one.
        tokenizer: of CLIP's text tower. Default: the one open_clip names for it, which may be downloaded.
        cache_dir: where downloads are kept. Default: the Hub client's cache.
        num_classes: another number than the head's gives a fresh linear layer in place of its classifier,
            see `Head.reset_classifier`; 0 gives features.
        checkpoint_path: a file of timm's or torch's with a state of the whole model, which is loaded last.
        features_only: return timm's feature extractor around the model: images -> maps of its blocks.
        feature_cls: of that extractor; "getter" is the only one that a head has.
        out_indices: the blocks whose maps it gives, see `Head.forward_intermediates`. Default: the last
            three.
        output_fmt: "NCHW", the default, or "NLC": how it gives them.
        device, dtype: where the model goes, and the floating-point type of its weights.
        pretrained_cfg: a tag, or one of timm's configs of a head, in place of the tag in the name.
        pretrained_cfg_overlay: changes of the preprocessing, in timm's terms, or where the head is: file,
            hf_hub_id.
        **options: of `DCPConfig`: n_ctx, depth, pooling, share_cmpa, coupling, ctx_init. A head has its own
            values. Of timm's `in_chans`, `img_size`, `global_pool` and drop rates only the values that a
            CLIP has.

    Returns:
        A `DCP` in training mode, as torch modules are: call `.eval()` to classify. Of another method,
        another `Head`; with `features_only` timm's extractor, images (B, 3, H, W) -> a list of maps (B, Dv,
        h, w), by block.

    Raises:
        ZooError: unknown names, a head that has not been trained yet, a checkpoint or options that do not
            fit.
    """
    check_choice("classifier", classifier, (None, "none"))
    check_choice("feature_cls", feature_cls, (None, "getter"))
    of_maps = (out_indices, output_fmt, feature_cls)
    if not features_only and of_maps != (None, None, None):
        raise ZooError("out_indices, output_fmt and feature_cls are of feature maps: pass features_only=True as well.")
    if classnames and num_classes not in (None, 0, len(classnames)):
        raise ZooError(f"num_classes={num_classes}, but there are {len(classnames)} class names: pass one of both.")
    overlay = dict(pretrained_cfg_overlay or {})
    name = _head_of_cfg(model_name, pretrained_cfg, overlay)
    fresh_classes = None if classnames else num_classes
    with downloads_in(cache_dir):
        resolved = resolve(name, pretrained, 0 if features_only else fresh_classes)
        model = build_head(resolved, classnames, descriptions, tokenizer, without_fixed(resolved.spec, options))
    model.stats = stats
    model.pretrained_cfg = without(overlay, (*PLACES.values(), "num_classes"))  # the preprocessing
    if classifier == "none":
        model.drop_text_probe()
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    if checkpoint_path:
        with as_zoo_error(f"{checkpoint_path} is no file with a state of this model: {{}}.", Exception):
            load_checkpoint(model, str(checkpoint_path), weights_only=True)
        if classifier == "none":
            model.drop_text_probe()
    with as_zoo_error(f"dtype={dtype!r}: {{}}. Pass a torch.dtype, such as torch.float16.", TypeError):
        model.to(device=device, dtype=dtype)
    return feature_extractor(model, out_indices, output_fmt) if features_only else model


PLACES = {"local-dir": "file", "hf-hub": "hf_hub_id"}  # where timm's configs have the rest of such a name


def _head_of_cfg(name: str, pretrained_cfg: Any, overlay: Values) -> str:
    """The name of the head that timm's arguments ask for: by its place in the overlay, or by
    `pretrained_cfg`, which is a head's tag or, for timm's own `hf-hub:` and `local-dir:` names, the config
    that timm has read there."""
    for scheme, key in PLACES.items():
        if overlay.get(key):
            return f"{scheme}:{overlay[key]}"
    if not pretrained_cfg:
        return name
    if isinstance(pretrained_cfg, str):
        cfg = {"tag": pretrained_cfg}
    else:
        cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else pretrained_cfg.to_dict()
    tag = cfg.get("tag")
    source = cfg.get("source")
    if tag != CLIP_TAG and source in PLACES:
        return f"{source}:{cfg[PLACES[source]]}"
    if not tag:
        raise ZooError(
            f"pretrained_cfg={pretrained_cfg!r} names no head of {name}. Pass a tag; changes of the preprocessing are "
            "pretrained_cfg_overlay."
        )
    return f"{name.partition('.')[0]}.{tag}"


def without_fixed(spec: ModelSpec, options: Values) -> Values:
    """Options without those of timm that a CLIP fixes; ZooError for other values of these."""
    fixed: Values = {name: 0 for name in options if "drop" in name}
    fixed |= {"in_chans": 3, "img_size": spec.image_size, "global_pool": "token"}
    for argument, only in fixed.items():
        check_only(argument, options.get(argument), only)
    return without(options, fixed)


def check_only(argument: str, value: Any, only: object) -> None:
    """Raise ZooError unless `value` is None or `only`, or the size of images of this height and width."""
    sides = set(value[-2:]) if isinstance(value, (list, tuple)) else {value}
    if value is not None and sides != {only}:
        raise ZooError(f"{argument}={value!r} is not possible, as CLIP is frozen, which has {only!r}.")


def feature_extractor(model: Head, blocks: int | Sequence[int] | None, output_fmt: str | None) -> Any:
    """timm's extractor of the feature maps of these blocks."""
    indices = take_blocks(3 if blocks is None else blocks, len(model.feature_info))
    extractor: Any = FeatureGetterNet(model, tuple(indices), output_fmt=output_fmt or FORMATS[0])
    extractor.pretrained_cfg = extractor.default_cfg = dict(model.encoder.pretrained_cfg)
    return extractor


def create_transform(
    model_or_name: FrozenCLIP | Head | FusedHead | str | None = None,
    is_training: bool = False,
    input_size: int | Sequence[int] | None = None,
    **changes: Any,
) -> Callable[[Any], torch.Tensor]:
    """PIL image -> normalised tensor (3, H, W). ZooError for another `input_size` than the model's.

    `changes` are of its interpolation, crop_pct, crop_mode, mean and std. With all of these, and the size,
    it needs no model: `create_transform(**timm.data.resolve_model_data_config(model))`.

    Testing: the CLIP's own, timm's bit for bit: resize of the short side and centre crop or, for some, of
    both sides. Training: random resized crop (8 to 100 % of the area) and horizontal flip, as in the DCP
    release, with torch's random numbers. It also takes uint8 tensors (3, h, w): faster than PIL, and within
    2 of 255 levels.
    """
    for name in changes:
        check_choice("change", name, PREPROCESSING)
    cfg: Values = {"input_size": input_size}
    if isinstance(model_or_name, str):
        cfg = get_pretrained_cfg(model_or_name)
    elif model_or_name is not None:
        cfg = model_or_name.pretrained_cfg
    cfg = cfg | changes
    missing = [name for name in PREPROCESSING if cfg.get(name) is None]
    if missing:
        raise ZooError(
            f"create_transform needs {', '.join(missing)}: pass a model, or all values of timm's data config."
        )
    size = cfg["input_size"][-1]
    check_only("input_size", input_size, size)
    if not is_training:
        return partial(_for_test, cfg)
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


def _for_test(cfg: Values, image: Any) -> torch.Tensor:
    return torch.from_numpy(normalise(crop(image, cfg), cfg))
