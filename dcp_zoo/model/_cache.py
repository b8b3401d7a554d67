"""A value that is computed from weights once, and again as soon as anything that it depends on has changed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class WeightCache:
    """Keeps one value. It is never kept, nor taken, where gradients are wanted or the code is being traced."""

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def __call__(self, compute: Callable[[], Any], tensors: Iterable[torch.Tensor], *others: Any) -> Any:
        """`compute()`, or its last value if `tensors` and `others` are as they were then."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        key = (fingerprint(tensors), *others)
        if key != self._key:
            self._key, self._value = key, compute()
        return self._value

    def __deepcopy__(self, memo: Any) -> "WeightCache":
        return WeightCache()

    def __reduce__(self) -> Any:
        return WeightCache, ()


def fingerprint(tensors: Iterable[torch.Tensor]) -> tuple[Any, ...]:
    """What tells whether tensors changed: their dtype, device, torch's version counter, and the sum of their bits.

    The counter sees whatever torch knows of, and the sum what it does not, such as `parameter.data.copy_(...)`. Adding
    up all weights of CLIP's text tower takes about 3 ms. Only a change through `.data` that leaves the sum of a
    tensor's 64-bit words as it was, such as swapping two rows, stays unseen.
    """
    tensors = list(tensors)
    kinds = tuple((t.dtype, t.device, version(t)) for t in tensors)
    return kinds, tuple(torch.stack([_sum_of_bits(t) for t in tensors]).tolist())


def version(t: torch.Tensor) -> int:
    """How often torch knows a tensor to have been written to; tensors of inference mode are not counted."""
    return 0 if t.is_inference() else t._version


def _sum_of_bits(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().reshape(-1)
    in_words = t.numel() * t.element_size() % 8 == 0
    return t.view(torch.int64 if in_words else torch.uint8).sum(dtype=torch.int64)
