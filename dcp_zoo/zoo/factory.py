"""The two factories of the zoo: a name becomes a model, or an image transform.

`create_model` takes three steps: `resolve` says what the name stands for, `build_head` makes that, and `TimmArguments`
does to it what `timm.create_model` would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from timm.models import load_checkpoint
from timm.models._features import FeatureGetterNet
from torch import nn

from dcp_zoo.backbone.classes import Descriptions
from dcp_zoo.backbone.clip import PREPROCESSING, FrozenCLIP
from dcp_zoo.backbone.tokens import Tokenizer
from dcp_zoo.backbone.towers import FORMATS, take_blocks
from dcp_zoo.data.images import crop, normalise
from dcp_zoo.errors import UNREADABLE, ZooError, as_zoo_error, check_choice, shorten
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import is_checkpoint
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head import Head
from dcp_zoo.zoo.build import build_head
from dcp_zoo.zoo.registry import ModelSpec, is_model
from dcp_zoo.zoo.resolve import get_pretrained_cfg, resolve

DROP_RATES = [f"{kind}drop_rate" for kind in ("", "attn_", "proj_", "pos_", "patch_")]
DROP_RATES += ["drop_path_rate", "drop_block_rate"]


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
    **options: Any,
) -> Any:
    """Create a model of the zoo.

    Args:
        model_name: a model ("dcp_vitb16", or "small", "medium", "large": the best for their cost), a head
            ("dcp_vitb16.imagenet-16shot"), a checkpoint folder, or "local-dir:path" if it has the name of a model,
            "hf-hub:org/repo[@revision]". Any other CLIP: "open_clip:ARCH/TAG" as in
            `open_clip.list_pretrained()`, or "open_clip:hf-hub:org/repo".
        pretrained: False for random weights (nothing is downloaded, as in timm), "clip" for CLIP's weights and fresh
            prompts, a tag such as "imagenet-16shot" of a model of the zoo for CLIP's weights and that head, True for
            the head in `model_name` or the model's default one. Random weights and fresh prompts are drawn from torch's
            random state, as those of any torch module.
        classnames: the classes to classify into. Default: the classes of the head, or of the model's default head.
        descriptions: sentences of each class, in place of its name. Default: the head's, if it has some.
        stats: see `DCP.stats`.
        classifier: "none" leaves out the text probe of a head, as in the papers. Default: with it, if it has one.
        tokenizer: of CLIP's text tower. Default: the one open_clip names for it, which may be downloaded.
        cache_dir: where downloads are kept. Default: the Hub client's cache.
        **options: of `DCPConfig`: n_ctx, depth, pooling, share_cmpa, coupling, ctx_init. A head has its own values.
            Those of timm: see `TimmArguments`.

    Returns:
        A `DCP` in training mode, as torch modules are: call `.eval()` to classify. Of another method, another `Head`;
        with `features_only` timm's extractor, images (B, 3, H, W) -> a list of maps (B, Dv, h, w), by block.

    Raises:
        ZooError: unknown names, a head that has not been trained yet, a checkpoint or options that do not fit.
    """
    arguments = TimmArguments.taken_from(options)
    if (path := arguments.checkpoint_path) and is_checkpoint(path):
        model_name, pretrained, arguments.checkpoint_path = f"local-dir:{path}", True, ""
    source = resolve(arguments.head_name(model_name), pretrained, cache_dir)
    model = build_head(source, classnames, descriptions, tokenizer, without_fixed(source.spec, options))
    model.stats = stats
    return arguments.applied(model, classnames, classifier)


@dataclass
class TimmArguments:
    """Arguments of `timm.create_model`, and what they do to a model of the zoo. Others of timm's, `in_chans`,
    `img_size`, `global_pool` and drop rates, have the only values that a CLIP can have, see `without_fixed`.

    Args:
        num_classes: another number than the head's gives a fresh layer, see `Head.reset_classifier`; 0 gives features.
        checkpoint_path: a file of timm's or torch's with a state of the whole model, or a checkpoint folder of the zoo.
        features_only: wrap the model in timm's feature extractor.
        feature_cls: "getter", the only extractor that a head has.
        out_indices: which blocks that gives, see `Classifier.forward_intermediates`. Default: the last three.
        output_fmt: of what it gives, see there.
        device, dtype: where the model goes, and the floating-point type of its weights.
        pretrained_cfg: a tag, or one of timm's configs of a head, in place of the tag in the name.
        pretrained_cfg_overlay: changes of the preprocessing, in timm's terms, or where the head is: file, hf_hub_id.
    """

    num_classes: int | None = None
    checkpoint_path: str | Path = ""
    features_only: bool = False
    feature_cls: str | None = None
    out_indices: int | Sequence[int] | None = None
    output_fmt: str | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    pretrained_cfg: Any = None
    pretrained_cfg_overlay: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("out_indices", "output_fmt", "feature_cls"):
            if (value := getattr(self, name)) is not None and not self.features_only:
                raise ZooError(f"{name}={value!r} is of feature maps: pass features_only=True as well.")
        check_choice("feature_cls", self.feature_cls, (None, "getter"))
        check_choice("output_fmt", self.output_fmt, (None, *FORMATS))
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            problem = f"dtype={self.dtype!r}: weights need a floating-point torch.dtype"
            raise ZooError(f"{problem}, such as torch.float16.")

    @classmethod
    def taken_from(cls, options: Values) -> "TimmArguments":
        """Those among the options, which are taken out there."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls) if field.name in options})

    def head_name(self, name: str) -> str:
        """The name by which the head is found that timm's configs ask for; takes its place out of the overlay. timm
        passes a head's tag or, for its own `hf-hub:` and `local-dir:` names, the config that it read there."""
        overlay = dict(self.pretrained_cfg_overlay or {})
        overlay.pop("num_classes", None)  # always the head's, which is in its config
        file, repo = overlay.pop("file", None), overlay.pop("hf_hub_id", None)
        self.pretrained_cfg_overlay = overlay
        if file or repo:
            return f"local-dir:{file}" if file else f"hf-hub:{repo}"
        given = self.pretrained_cfg
        if not given:
            return name
        cfg = {"tag": given} if isinstance(given, str) else given if isinstance(given, dict) else given.to_dict()
        if (kind := cfg.get("source")) in ("local-dir", "hf-hub"):
            return f"{kind}:{cfg['file' if kind == 'local-dir' else 'hf_hub_id']}"
        if not (tag := cfg.get("tag")) or not is_model(name):
            problem = f"pretrained_cfg={given!r} names no head of {name}"
            raise ZooError(f"{problem}. Pass a tag; changes of the preprocessing are pretrained_cfg_overlay.")
        return f"{name.partition('.')[0]}.{tag}"

    def applied(self, model: Head, classnames: Sequence[str] | None, classifier: str | None) -> nn.Module:
        """The model with these arguments, and without its text probe if `classifier` is "none"."""
        if classifier is not None:
            check_choice("classifier", classifier, ("none",))
        for reading in model.readings:  # whose preprocessing images get
            reading.encoder.pretrained_cfg |= self.pretrained_cfg_overlay or {}
        if classifier == "none":
            model.drop_text_probe()
        if self.num_classes not in (None, model.num_classes):
            if classnames and self.num_classes:
                problem = f"num_classes={self.num_classes}, but there are {len(classnames)} class names"
                raise ZooError(f"{problem}: pass one of both.")
            model.reset_classifier(self.num_classes)
        if self.checkpoint_path:
            load_state(model, Path(self.checkpoint_path))
            if classifier == "none":
                model.drop_text_probe()
        model.to(device=self.device, dtype=self.dtype)
        if not self.features_only:
            return model
        blocks = take_blocks(3 if self.out_indices is None else self.out_indices, len(model.feature_info))
        net: Any = FeatureGetterNet(model, tuple(blocks), output_fmt=self.output_fmt or FORMATS[0])
        net.pretrained_cfg = net.default_cfg = dict(model.encoder.pretrained_cfg)
        return net


def without_fixed(spec: ModelSpec, options: Values) -> Values:
    """Options without those of timm that a CLIP fixes; ZooError for other values of these."""
    square = f"{spec.name} reads square images of one size", sizes(spec.image_size)
    fixed = {"in_chans": ("CLIP reads RGB images", (3,)), "img_size": square}
    fixed["global_pool"] = "CLIP pools its class token", ("token",)
    fixed |= dict.fromkeys(DROP_RATES, ("a DCP has no dropout", (0,)))
    for argument in options.keys() & fixed.keys():
        check_only(argument, options[argument], *fixed[argument])
    return {argument: value for argument, value in options.items() if argument not in fixed}


def check_only(argument: str, value: object, reason: str, values: tuple[object, ...]) -> None:
    """Raise ZooError unless `value` is None or one of the equivalent `values`."""
    if value not in (None, *values):
        raise ZooError(f"{argument}={value!r}: {reason}, only {values[0]!r} is supported.")


def sizes(size: int) -> tuple[object, ...]:
    """The ways in which timm writes the size of square images in RGB."""
    return size, (size, size), [size, size], (3, size, size), [3, size, size]


def load_state(model: Head, path: Path) -> None:
    """Load a state of the whole model from a file of timm's or torch's; ZooError for no such file, or another one."""
    if not path.is_file():
        raise ZooError(f"There is no file or checkpoint folder {path}: pass the path of one.")
    name = model.encoder.architecture
    wrong = f"{path} does not have the tensors of this {name}: {{}} Pass a file that was saved with its options."
    with as_zoo_error(wrong, RuntimeError, UnpicklingError, *UNREADABLE):
        try:
            load_checkpoint(model, str(path), weights_only=True)
        except RuntimeError as error:  # torch names all keys
            lines = [shorten(line.strip().split('", "'), 4) for line in str(error).splitlines()]
            raise RuntimeError(shorten(lines, 4)) from error


def create_transform(
    model_or_name: FrozenCLIP | Head | FusedHead | str | None = None,
    is_training: bool = False,
    input_size: int | Sequence[int] | None = None,
    **changes: Any,
) -> Callable[[Any], torch.Tensor]:
    """PIL image -> normalised tensor (3, H, W). ZooError for another `input_size` than the model's.

    `changes` are of its interpolation, crop_pct, crop_mode, mean and std. With all of these, and the size, it needs no
    model: `create_transform(**timm.data.resolve_model_data_config(model))`.

    Testing: the CLIP's own, timm's bit for bit: resize of the short side and centre crop or, for some, of both sides.
    Training: random resized crop (8 to 100 % of the area) and horizontal flip, as in the DCP release, with torch's
    random numbers. It also takes uint8 tensors (3, h, w): faster than PIL, and within 2 of 255 levels.
    """
    for name in changes:
        check_choice("change", name, PREPROCESSING)
    cfg: Values = {"input_size": input_size}
    if model_or_name is not None:
        cfg = get_pretrained_cfg(model_or_name) if isinstance(model_or_name, str) else model_or_name.pretrained_cfg
    cfg = cfg | changes
    if missing := [name for name in PREPROCESSING if cfg.get(name) is None]:
        raise ZooError(
            f"create_transform needs {', '.join(missing)}: pass a model, or all values of timm's data config."
        )
    size = cfg["input_size"][-1]
    check_only("input_size", input_size, "the model reads square images of one size", sizes(size))
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
