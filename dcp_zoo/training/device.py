"""What a run computes on: the seed, the device and the precision."""

import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model.dcp import DCP
from dcp_zoo.training.recipes import PRECISIONS


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """A torch device; "auto" is CUDA, else MPS, else the CPU. ZooError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ZooError(f"Device {name!r} is not available ({error}). Use --device auto or cpu.") from error


@torch.no_grad()
def cast_frozen(model: DCP, precision: str) -> None:
    """Store CLIP's weights in this precision only; trained parameters and the logit scale stay in float32."""
    for p in model.clip.parameters():
        if p.numel() > 1 and p.is_floating_point():
            p.data = p.data.to(getattr(torch, precision))


def autocast(device: torch.device, precision: str) -> Any:
    """The autocast context of a precision; a null context for float32. ZooError for an unknown precision."""
    check_choice("precision", precision, PRECISIONS)
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))
