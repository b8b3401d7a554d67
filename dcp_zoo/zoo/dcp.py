"""The zoo's models in timm's registry: importing `dcp_zoo` makes `timm.create_model("dcp_vitb16")` work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, register_model

from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.timm_contract import check_pool
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import MODELS, all_heads, get_pretrained_cfg, get_spec

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
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        pretrained_model_args: dict[str, Any] | None = None,
        num_classes: int | None = None,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> DCP:
        _check_args(name, in_chans, img_size, global_pool, drop_rate)
        overlay = dict(pretrained_cfg_overlay or {})
        model = create_model(_full_name(name, pretrained_cfg, overlay), pretrained, **kwargs)
        if num_classes is not None:
            model.reset_classifier(num_classes)
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | overlay
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"`dcp_zoo.create_model({name!r}, ...)` for timm."
    return entrypoint


def _full_name(name: str, cfg: str | dict[str, Any] | PretrainedCfg | None, overlay: dict[str, Any]) -> str:
    """What `create_model` calls the weights that timm asks for; takes out of `overlay` what says where they are.

    timm gives a head's tag, or for its own `hf-hub:` and `local-dir:` names the config that it read there.
    """
    overlay.pop("num_classes", None)  # only ever the source's, and that is in its config
    if file := overlay.pop("file", None):
        return f"local-dir:{file if Path(file).is_dir() else Path(file).parent}"
    if repo := overlay.pop("hf_hub_id", None):
        return f"hf-hub:{repo}"
    if cfg is None or isinstance(cfg, str):
        return f"{name}.{cfg}" if cfg else name
    facts = cfg if isinstance(cfg, dict) else cfg.to_dict()
    if facts.get("source") == "local-dir":
        return f"local-dir:{facts['file']}"
    if facts.get("source") == "hf-hub":
        return f"hf-hub:{facts['hf_hub_id']}"
    return f"{name}.{facts['tag']}" if facts.get("tag") else name


def _check_args(name: str, in_chans: int, img_size: Any, global_pool: str | None, drop_rate: float) -> None:
    """Raise ZooError for what timm's scripts pass and a DCP cannot honour."""
    size = get_spec(name).image_size
    check_pool(global_pool)
    if in_chans != 3:
        raise ZooError(f"in_chans={in_chans}: CLIP reads RGB images, only 3 can be honoured.")
    if img_size is not None and img_size not in (size, (size, size), [size, size]):
        raise ZooError(f"img_size={img_size}: {name} reads images of {size} pixels, only that can be honoured.")
    if drop_rate:
        raise ZooError(f"drop_rate={drop_rate}: a DCP has no dropout, only 0 can be honoured.")


for _name in MODELS:  # one row of the table is all that a new model needs
    globals()[_name] = register_model(_entrypoint(_name))
