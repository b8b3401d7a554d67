"""The zoo's models in timm's registry, so that `timm.create_model("dcp_vitb16")` works. timm takes the name
of this module for that of the family: `timm.list_models(module="dcp")`.

`register` runs once timm is imported, see `dcp_zoo/__init__.py`. This module must not import anything at the
top that imports timm, as open_clip does: that would be a circular import.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dcp_zoo.fields import Values
from dcp_zoo.heads.config import without
from dcp_zoo.zoo.registry import CLIP_TAG, all_heads, clip_cfg
from dcp_zoo.zoo.specs import MODELS, get_spec

if TYPE_CHECKING:
    from torch import nn

__all__: list[str] = []  # timm adds the models' names
default_cfgs: Values = {}  # filled by `register`, read by timm


def register(timm: ModuleType) -> None:
    """Register every model of the zoo with timm, and its heads as the model's pretrained tags; let timm save
    heads."""
    # waits if another thread is importing timm
    from timm.models import _hub, generate_default_cfgs, register_model, save_for_hf

    timm.models.save_for_hf = _hub.save_for_hf = _saving(save_for_hf)

    default_cfgs.update(generate_default_cfgs(_head_cfgs()))
    for name in MODELS:
        register_model(_entrypoint(name))


def _saving(save: Callable[..., None]) -> Callable[..., None]:
    """timm's `save_for_hf`, which `push_to_hf_hub` calls too, and which writes the checkpoint of a head.
    timm itself would write all tensors, CLIP's included, and a config.json that says too little to read them
    again; a head writes its own config.json in any case."""

    @functools.wraps(save)
    def save_for_hf(model: "nn.Module", save_directory: str, *args: Any, **kwargs: Any) -> None:
        from dcp_zoo.heads.head import Head

        if isinstance(model, Head):
            model.save_pretrained(save_directory)
        else:
            save(model, save_directory, *args, **kwargs)

    return save_for_hf


def _head_cfgs() -> Values:
    """timm's config of CLIP's own weights and of every head; the tag of a model's default head ends in a
    star. timm lists a config as pretrained if it has a weight source, so planned heads have none. Default
    heads come last, or timm prefers what has weights."""
    cfgs: Values = {f"{name}.{CLIP_TAG}": clip_cfg(spec) for name, spec in MODELS.items()}
    default_heads: Values = {}
    for name, head in all_heads().items():
        cfg = head.pretrained_cfg
        if head.status == "planned":
            cfg = without(cfg, ("hf_hub_id", "source"))
        if name == MODELS[head.model].default_head:
            default_heads[f"{name}*"] = cfg
        else:
            cfgs[name] = cfg
    return cfgs | default_heads


@functools.cache
def _entrypoint(name: str) -> Callable[..., Any]:
    def entrypoint(
        pretrained: bool | str = False,
        pretrained_model_args: Values | None = None,  # since timm 1.0.31; repeated in kwargs
        **kwargs: Any,
    ) -> Any:
        from dcp_zoo.zoo.factory import create_model

        return create_model(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"`dcp_zoo.create_model({name!r}, ...)`."
    return entrypoint


def model_entrypoint(model_name: str) -> Callable[..., Any]:
    """The function that makes a model, whatever its tag, as `timm.model_entrypoint`; ZooError for an unknown
    one."""
    return _entrypoint(get_spec(model_name.partition(".")[0]).name)
