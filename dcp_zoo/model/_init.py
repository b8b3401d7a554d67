"""Building models whose weights come from a file: nothing is drawn at random first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# in-place draws, by themselves and by way of torch.nn.init
DRAWS = (
    "normal_",
    "uniform_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
)


class _NoDraws(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.randn:
            return torch.empty(*args, **kwargs)
        if getattr(function, "__name__", "") in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def skip_init(skip: bool = True) -> Iterator[None]:
    """While it is open, new modules are left uninitialised instead of drawn at random: load all their weights then."""
    if not skip:
        yield
        return
    with _NoDraws():
        yield
