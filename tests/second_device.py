"""A second device on a machine that has none: its tensors are on the CPU, but say that they are elsewhere, and an
operation that mixes them with the CPU's fails as it would on a GPU.

"meta" is the only other device that every torch accepts; in the context of `second_device`, it computes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # take the CPU's indices


class OnDevice(torch.Tensor):
    """A tensor of the second device around one of the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=CPU, dispatch_device=True, **layout
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: "OnDevice") -> None:
        torch._C.TensorBase.data.__set__(self, new)
        self.inner = new.inner


def computed(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation, on the device of its tensors or on the one that it asks for."""
    if operation is torch.ops.prim.device.default:
        return DEVICE
    tensors: list[torch.Tensor] = []
    mapped([*args, *kwargs.values()], tensors.append)
    ours = [t for t in tensors if isinstance(t, OnDevice)]
    asked = kwargs.get("device")
    there = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
    if operation in COPIES:
        there = isinstance(tensors[0], OnDevice) if asked is None else there
    elif ours and operation.overloadpacket.__name__ not in INDEXING:
        others = [tuple(t.shape) for t in tensors if not isinstance(t, OnDevice) and t.ndim]  # numbers may be mixed
        assert not others, f"{operation} mixes tensors of the device with the CPU's {others}"
    assert not (there and kwargs.get("generator")), f"{operation} draws on the device with the CPU's generator"
    inner_args = mapped(args, inner)
    inner_kwargs = {name: mapped(value, inner) for name, value in kwargs.items()}
    if asked is not None:
        inner_kwargs["device"] = CPU
    known = {id(t.inner): t for t in ours}  # in-place operations return their argument

    def placed(t: torch.Tensor) -> torch.Tensor:
        return known[id(t)] if id(t) in known else OnDevice(t)

    result = operation(*inner_args, **inner_kwargs)
    return mapped(result, placed) if there else result


def inner(t: torch.Tensor) -> torch.Tensor:
    return t.inner if isinstance(t, OnDevice) else t


def mapped(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with its tensors, which may be in lists, replaced; torch's `tree_map` takes several times as long."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(mapped(v, function) for v in value) if isinstance(value, (list, tuple)) else value


class Computing(TorchDispatchMode):
    """Operations without tensors of the device, which may ask for one."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Inside, "meta" is a second device, with the CPU's autocast, and inference mode is no_grad."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            function = getattr(torch, name)
            patch.setattr(torch, name, lambda kind, *args, f=function, **kw: f("cpu", *args, **kw))
        make = torch.tensor  # which asks no mode
        patch.setattr(torch, "tensor", lambda values, *, device=None, **kw: make(values, **kw).to(device or CPU))
        for name in ("__enter__", "__exit__"):  # tensors without data of their own have no inference mode
            patch.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
        was = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with Computing():
                yield DEVICE
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(was)
