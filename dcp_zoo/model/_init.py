"""Building models whose weights come from a file: nothing is drawn at random first, nothing is copied twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
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


def load_clip(clip: nn.Module, path: str | Path) -> None:
    """Load CLIP's weights strictly. A safetensors file of exactly its tensors stays memory-mapped until it is used;
    open_clip's own loader converts whatever else it knows."""
    if Path(path).suffix == ".safetensors":
        state = load_file(path)
        if {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in clip.state_dict().items()}:
            clip.load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
            return
    import open_clip

    open_clip.load_checkpoint(clip, str(path))
