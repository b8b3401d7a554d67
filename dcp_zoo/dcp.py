"""The zoo's models in timm's registry: importing `dcp_zoo` makes `timm.create_model("dcp_vitb16")` work."""

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, register_model

from .factory import create_model
from .model import DCP
from .registry import MODELS, all_heads, get_pretrained_cfg

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        f"{head.name}*" if head.tag == MODELS[head.model].default_tag else head.name: get_pretrained_cfg(head.name)
        for head in all_heads().values()
    }
)


def _entrypoint(name: str) -> Callable[..., DCP]:
    def entrypoint(
        pretrained: bool | str = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> DCP:
        tag = pretrained_cfg if isinstance(pretrained_cfg, str) else None
        return create_model(f"{name}.{tag}" if tag else name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"`dcp_zoo.create_model({name!r}, ...)` for timm."
    return entrypoint


for _name in MODELS:  # one row of the table is all that a new model needs
    globals()[_name] = register_model(_entrypoint(_name))
