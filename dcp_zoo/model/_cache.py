"""Caches a value computed from weights until one of them changes."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch


class WeightCache:
    """Caches one value for each change of weights or mode (inference, autocast). It is bypassed while gradients are
    enabled or code is traced.

    Changes are detected by the tensors' identity, storage, dtype, device and torch's version counter. Writes that torch
    does not count, such as `parameter.data.add_(1)` or those under `torch.inference_mode`, are not detected: write
    under `torch.no_grad` instead, as optimizers and `load_state_dict` do.
    """

    def __init__(self) -> None:
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self._key: Any = None
        self._value: Any = None

    def __call__(self, compute: Callable[[], Any], tensors: Iterable[torch.Tensor], *others: Any) -> Any:
        """`compute()`, or its last value if `tensors` and `others` have not changed since."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        tensors = list(tensors)
        kind = tensors[0].device.type
        mode = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = ([(t.data_ptr(), t.dtype, t.device, _version(t)) for t in tensors], mode, *others)
        same = len(tensors) == len(self._tensors) and all(r() is t for r, t in zip(self._tensors, tensors, strict=True))
        if not same or key != self._key:
            self._tensors, self._key, self._value = [weakref.ref(t) for t in tensors], key, compute()
        return self._value

    def __deepcopy__(self, memo: Any) -> "WeightCache":
        return WeightCache()

    def __reduce__(self) -> Any:
        return WeightCache, ()


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version  # torch does not count writes to inference tensors
