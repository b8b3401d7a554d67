"""The zoo's models in timm's registry, so that `timm.create_model("dcp_vitb16")` works. timm takes the name of
this module for that of the family: `timm.list_models(module="dcp")`.

`register` runs once timm is imported, see `dcp_zoo/__init__.py`. This module must not import anything at the top that
imports timm, as open_clip does: that would be a circular import.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.zoo.registry import MODELS, all_heads

__all__: list[str] = []  # timm adds the models' names
default_cfgs: Values = {}  # filled by `register`, read by timm


def register(timm: ModuleType) -> None:
    """Register every model of the zoo with timm, and its heads as the model's pretrained tags; let timm save heads."""
    # waits if another thread is importing timm
    from timm.models import _hub, generate_default_cfgs, register_model, save_for_hf

    timm.models.save_for_hf = _hub.save_for_hf = _saving(save_for_hf)

    default_cfgs.update(generate_default_cfgs(_head_cfgs()))
    for name in MODELS:
        register_model(_entrypoint(name))


def _saving(save: Callable[..., None]) -> Callable[..., None]:
    """timm's `save_for_hf`, which `push_to_hf_hub` calls too, and which writes the checkpoint of a head. timm itself
    would write all tensors, CLIP's included, and a config.json that says too little to read them again."""

    @functools.wraps(save)
    def save_for_hf(model: nn.Module, save_directory: str, *args: Any, **kwargs: Any) -> None:
        from dcp_zoo.heads.head import Head

        if not isinstance(model, Head):
            save(model, save_directory, *args, **kwargs)
        elif any(args) or kwargs.get("model_config") or kwargs.get("model_args"):
            advice = "Omit it; model.save_pretrained(directory, name=value) adds values."
            raise ZooError(f"model_config: a head writes its own config.json. {advice}")
        else:
            model.save_pretrained(save_directory)

    return save_for_hf


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
        **kwargs: Any,
    ) -> nn.Module:
        from dcp_zoo.zoo.factory import create_model

        overlay = dict(pretrained_cfg_overlay or {})
        full_name = _full_name(name, pretrained_cfg, overlay)
        return create_model(full_name, pretrained, pretrained_cfg_overlay=overlay, **kwargs)

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
