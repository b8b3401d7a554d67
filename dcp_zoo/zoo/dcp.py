"""The zoo's models in timm's registry, so that `timm.create_model("dcp_vitb16")` works.

`register` runs once timm is imported, see `dcp_zoo/__init__.py`. This module must not import anything at the top that
imports timm, as open_clip does: that would be a circular import.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.model.timm_contract import POOL, check_only, take_blocks
from dcp_zoo.zoo.registry import MODELS, all_heads, get_spec

__all__: list[str] = []  # timm adds the models' names
default_cfgs: Values = {}  # filled by `register`, read by timm

DROP_RATES = [f"{kind}drop_rate" for kind in ("", "attn_", "proj_", "pos_", "patch_")]
DROP_RATES += ["drop_path_rate", "drop_block_rate"]


def register(timm: ModuleType) -> None:
    """Register every model of the zoo with timm, and its heads as the model's pretrained tags."""
    from timm.models import generate_default_cfgs, register_model  # waits if another thread is importing timm

    default_cfgs.update(generate_default_cfgs(_head_cfgs()))
    for name in MODELS:
        globals()[name] = register_model(_entrypoint(name))


def _head_cfgs() -> Values:
    """timm's config of every head; the tag of a model's default head ends in a star. timm lists a config as pretrained
    if it has a weight source, so planned heads have none. Default heads come last, or timm prefers trained ones."""
    defaults = {f"{spec.name}.{spec.default_tag}" for spec in MODELS.values()}
    cfgs: Values = {}
    for name, head in sorted(all_heads().items(), key=lambda item: item[0] in defaults):
        hidden = ("hf_hub_id", "source") if head.status == "planned" else ()
        cfg = {k: v for k, v in head.pretrained_cfg.items() if k not in hidden}
        cfgs[f"{name}*" if name in defaults else name] = cfg
    return cfgs


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def entrypoint(
        pretrained: bool | str = False,
        pretrained_cfg: Any = None,  # a tag, a dictionary or timm's own class
        pretrained_cfg_overlay: Values | None = None,
        pretrained_model_args: Values | None = None,  # since timm 1.0.31; repeated in kwargs
        num_classes: int | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        from dcp_zoo.zoo.factory import create_model

        zoo_args = _zoo_args(name, kwargs)
        if out_indices is not None and not features_only:
            raise ZooError(f"out_indices={out_indices!r} selects feature maps: pass features_only=True as well.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ZooError(f"dtype={dtype!r}: weights need a floating-point torch.dtype, such as torch.float16.")
        overlay = dict(pretrained_cfg_overlay or {})
        model = create_model(_full_name(name, pretrained_cfg, overlay), pretrained, **zoo_args)
        if num_classes is not None:
            model.reset_classifier(num_classes)
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | overlay
        for reading in model.readings:  # whose preprocessing images get
            reading.encoder.pretrained_cfg |= overlay
        model.to(device=device, dtype=dtype)
        return _feature_net(model, 3 if out_indices is None else out_indices) if features_only else model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"`dcp_zoo.create_model({name!r}, ...)` for timm."
    return entrypoint


def _full_name(name: str, cfg: Any, overlay: Values) -> str:
    """The name by which `create_model` finds the weights timm requests; removes their location from `overlay`. timm
    passes a head's tag or, for its own `hf-hub:` and `local-dir:` names, the config it read there."""
    overlay.pop("num_classes", None)  # always the source's, which is in its config
    if file := overlay.pop("file", None):
        return f"local-dir:{file}"
    if repo := overlay.pop("hf_hub_id", None):
        return f"hf-hub:{repo}"
    given = {"tag": cfg} if isinstance(cfg, str) else cfg or {}
    values = given if isinstance(given, dict) else given.to_dict()
    if values.get("source") == "local-dir":
        return f"local-dir:{values['file']}"
    if values.get("source") == "hf-hub":
        return f"hf-hub:{values['hf_hub_id']}"
    return f"{name}.{values['tag']}" if values.get("tag") else name


def _zoo_args(name: str, kwargs: Values) -> Values:
    """The arguments for `dcp_zoo.create_model`: `kwargs` without those that timm's scripts pass and a DCP fixes."""
    size = get_spec(name).image_size
    fixed: dict[str, tuple[str, tuple[Any, ...]]] = {
        "in_chans": ("CLIP reads RGB images", (3,)),
        "img_size": (f"{name} reads square images of one size", (size, (size, size), [size, size])),
        "global_pool": POOL,
        **dict.fromkeys(DROP_RATES, ("a DCP has no dropout", (0,))),
    }
    for argument in kwargs.keys() & fixed.keys():
        check_only(argument, kwargs[argument], *fixed[argument])
    return {argument: value for argument, value in kwargs.items() if argument not in fixed}


def _feature_net(model: Any, out_indices: int | Sequence[int]) -> nn.Module:
    """timm's feature extractor around a model: images (B, 3, H, W) -> a list of maps (B, Dv, h, w), by block."""
    from timm.models import build_model_with_cfg

    blocks = take_blocks(out_indices, len(model.encoder.vision_tower.blocks))
    return build_model_with_cfg(
        lambda **_: model,  # already built and loaded
        model.encoder.architecture,
        pretrained=False,
        pretrained_cfg=model.pretrained_cfg,
        feature_cfg={"out_indices": blocks, "feature_cls": "getter"},
        features_only=True,
    )
