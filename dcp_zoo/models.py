"""The zoo's models as functions, as timm has its own: `from dcp_zoo.models import dcp_vitb16`, then
`dcp_vitb16(pretrained="imagenet-16shot")`; arguments are those of `dcp_zoo.create_model`. Editors and type
checkers find each function in `models.pyi`, which `hub/model_stubs.py` writes."""

from dcp_zoo.zoo.dcp import model_entrypoint
from dcp_zoo.zoo.specs import MODELS

__all__ = list(MODELS)  # pyright: ignore[reportUnsupportedDunderAll]
globals().update({name: model_entrypoint(name) for name in MODELS})
