"""How images are prepared for a model, in timm's terms; it does not import torch."""

from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, TypedDict

from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values

RESAMPLINGS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # as Pillow has them


class Preprocessing(TypedDict, total=False):
    """The entries of timm's `pretrained_cfg` about it. `config.json` stores them, and a head that is loaded
    has them in `pretrained_cfg` of its CLIP, where all others look them up."""

    input_size: tuple[int, int, int]
    interpolation: Annotated[str, {"choices": RESAMPLINGS}]
    crop_pct: Annotated[float, {"min": 0.01}]
    crop_mode: Annotated[str, {"choices": ("center", "squash")}]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


PREPROCESSING = tuple(Preprocessing.__annotations__)


def preprocessing_in(cfg: Mapping[str, Any]) -> Values:
    """The `Preprocessing` in a `pretrained_cfg`, with the tuples that JSON made lists."""
    found: Values = {}
    for name in PREPROCESSING:
        if name in cfg:
            found[name] = tuple(cfg[name]) if isinstance(cfg[name], list) else cfg[name]
    return found


class PretrainedCfg(Values):
    """timm's record of a model, made anew whenever it is read. ZooError for changes in place, which would be
    lost."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        advice = 'Set what shall change: model.pretrained_cfg = {"mean": ...}'
        raise ZooError(
            f"model.pretrained_cfg is made anew whenever it is read: a change in it would be lost. {advice}."
        )

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type, tuple[Values]]:
        """A copy is a plain dictionary."""
        return dict, (dict(self),)
