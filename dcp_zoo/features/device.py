"""What a run computes on: the device, and its precision."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from dcp_zoo.errors import as_zoo_error, check_choice
from dcp_zoo.features import AUTO, MANY, PRECISIONS
from dcp_zoo.threads import available_cores
from dcp_zoo.zoo.specs import MODELS, OPEN_CLIP


def pick_device(name: str = "auto") -> torch.device:
    """A torch device; "auto" is CUDA, "auto:3" the GPU of the fourth process on a machine, else MPS,
    else the CPU. ZooError if it is not available."""
    kind, _, rank = name.partition(":")
    if kind == "auto":
        gpus = torch.cuda.device_count()
        if gpus:
            name = f"cuda:{int(rank) % gpus}" if rank else "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    unavailable = f"Device {name!r} is not available ({{}}). Use --device auto or cpu."
    with as_zoo_error(unavailable, RuntimeError, AssertionError):
        torch.empty(0, device=name)
        return torch.device(name)


def decoders(device: torch.device, images: int) -> int:
    """The number of processes that decode so many images: one for each core where a GPU would wait for
    images that memory does not keep, else 0: this process decodes, by threads."""
    return available_cores() if device.type == "cuda" and images > MANY else 0


def pick_precision(name: str, model: str, device: torch.device) -> str:
    """A precision for a model; "auto" is bfloat16 for a CLIP of open_clip where the device multiplies
    in it, and float32 elsewhere and for the miniature, which is too small to gain. ZooError for an
    unknown one."""
    check_choice("precision", name, (AUTO, *PRECISIONS))
    if name != AUTO:
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
        fast = device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
    is_real = model.startswith(OPEN_CLIP) or (model in MODELS and MODELS[model].clip_repo)
    return "bfloat16" if fast and is_real else "float32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context of a precision, in place of the caller's, as features are kept; for float32,
    none."""
    if precision != "float32":
        return torch.autocast(device.type, getattr(torch, precision))
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of three calls: the first takes longer, and others where the machine is busy."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


@torch.no_grad()
def seconds_per_image(
    model: Callable[[torch.Tensor], object], size: Sequence[int], device: torch.device, precision: str, images: int = 8
) -> float:
    """What a model takes for an image of this size (3, H, W) in a batch, without decoding."""
    pixels = torch.zeros(images, *size, device=device)
    with autocast(device, precision):
        return fastest(lambda: model(pixels), device) / images
