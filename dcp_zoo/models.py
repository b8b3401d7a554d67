"""The zoo's models as functions, as timm has its own: `from dcp_zoo.models import dcp_vitb16`, then
`dcp_vitb16(pretrained="imagenet-16shot")`; arguments are those of `dcp_zoo.create_model`."""

from collections.abc import Callable
from typing import Any

from dcp_zoo.zoo.dcp import model_entrypoint
from dcp_zoo.zoo.registry import MODELS

__all__ = list(MODELS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Callable[..., Any]:
    if name in MODELS:
        return model_entrypoint(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: choose from {', '.join(MODELS)}")


def __dir__() -> list[str]:
    return __all__
