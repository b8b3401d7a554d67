"""Fast matrix products with frozen weights on CPUs."""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

PLAIN = (nn.Linear, NonDynamicallyQuantizableLinear)  # the second is the output layer of torch's attention


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`: x (..., in), weight (out, in), bias (out) -> (..., out).

    For frozen float32 weights on a CPU it calls oneDNN, which uses AVX-512 wherever it is available. `F.linear` calls
    MKL, which does not use it on AMD processors and takes about twice as long there.
    `torch.backends.mkldnn.flags(enabled=False)` disables this, and torch builds without oneDNN use `F.linear`.
    """
    if not _can_use_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _OneDNN.apply(x, weight, bias) if torch.is_grad_enabled() else _onednn(x, weight, bias)


def call_linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """`module(x)` for a linear module, computed by `linear` unless it is quantised."""
    return linear(x, module.weight, module.bias) if type(module) in PLAIN else module(x)


def _can_use_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.backends.mkldnn.enabled:
        return False
    if torch._C._are_functorch_transforms_active():  # torch.func knows no rule for the operator
        return False
    if (weight.requires_grad and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu"):
        return False
    if not (x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32):
        return False
    return x.numel() > 0 and _has_onednn()


@cache
def _has_onednn() -> bool:
    """Whether the operator, which is not part of torch's public API, is available: tried once with a small product."""
    if not torch.backends.mkldnn.is_available():
        return False
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    try:
        _onednn(one, one, None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    """`_onednn` with a gradient for x only, which can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.t()), None, None
