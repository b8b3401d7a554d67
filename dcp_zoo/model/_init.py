"""Build models whose weights come from a file, without random initialisation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# in-place random initialisation, called directly or through torch.nn.init
RANDOM_INIT = (
    "normal_",
    "uniform_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
)


class _SkipInit(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.randn:
            return torch.empty(*args, **kwargs)
        if getattr(function, "__name__", "") in RANDOM_INIT:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def skip_init(skip: bool = True) -> Iterator[None]:
    """Inside this context, new modules stay uninitialised, so that all their weights must be loaded afterwards."""
    if not skip:
        yield
        return
    with _SkipInit():
        yield
