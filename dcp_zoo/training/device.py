"""What a run computes on: the device, its precision, and its memory."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from dcp_zoo.errors import as_zoo_error, check_choice
from dcp_zoo.heads.head import Head
from dcp_zoo.threads import available_cores
from dcp_zoo.training.recipes import AS_RELEASED, AUTO, MANY, PRECISIONS
from dcp_zoo.zoo.registry import MODELS, OPEN_CLIP

VALUES_PER_CHANNEL = 18  # kept for the backward pass of one block, per token and channel of its width; measured
DEFAULT_MEMORY = 8 * 2**30  # bytes, assumed where the system does not report its memory


def pick_device(name: str = "auto") -> torch.device:
    """A torch device; "auto" is CUDA, "auto:3" the GPU of the fourth process on a machine, else MPS, else the CPU.
    ZooError if it is not available."""
    kind, _, rank = name.partition(":")
    if kind == "auto" and (gpus := torch.cuda.device_count()):
        name = f"cuda:{int(rank) % gpus}" if rank else "cuda"
    elif kind == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    unavailable = f"Device {name!r} is not available ({{}}). Use --device auto or cpu."
    with as_zoo_error(unavailable, RuntimeError, AssertionError):
        torch.empty(0, device=name)
        return torch.device(name)


def decoders(device: torch.device, images: int) -> int:
    """Processes that decode so many images: one for each core where a GPU would wait for images that memory does not
    keep, else 0: this process, by threads."""
    return available_cores() if device.type == "cuda" and images > MANY else 0


def pick_precision(name: str, model: str, device: torch.device) -> str:
    """A precision for a model; "auto" is bfloat16 for a CLIP of open_clip where the device multiplies in it, and
    float32 elsewhere and for the miniature, which is too small to gain. ZooError for an unknown one."""
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


def computed_in(precision: str, device: torch.device) -> torch.dtype:
    """The type of most computations of a precision. That of the release is float16's on a GPU; elsewhere only its
    rounded weights are emulated, see `TrainingState`."""
    if precision == AS_RELEASED:
        precision = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, precision)


@torch.no_grad()
def cast_frozen(model: Head, precision: str) -> None:
    """Store CLIP's weights in this precision only; trained parameters and the logit scale stay in float32."""
    for p in model.encoder.clip.parameters():
        if p.numel() > 1 and p.is_floating_point():
            p.data = p.data.to(computed_in(precision, p.device))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context of a precision, none for float32, in place of the caller's: features are kept."""
    dtype = computed_in(precision, device)
    if dtype != torch.float32:
        return torch.autocast(device.type, dtype)
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def needs_checkpointing(model: Head, batch: int) -> bool:
    """Whether a training step over `batch` images recomputes its activations in the backward pass: if they would fill
    more than a quarter of the device's memory."""
    return activation_bytes(model, batch) > total_memory(model.device) / 4


def activation_bytes(model: Head, batch: int) -> int:
    """Bytes that both towers would keep for the backward pass of a step."""
    vision = model.encoder.vision_tower
    channels = batch * (vision.num_tokens + model.num_image_prompts) * vision.width * len(vision.blocks)
    if (names := getattr(model, "name_tokens", None)) is not None:  # with learned prompts in the text
        name_tokens, text = sum(chunk.ids.numel() for chunk in names), model.encoder.text_tower
        channels += name_tokens * text.width * len(text.blocks)
    return channels * vision.dtype.itemsize * VALUES_PER_CHANNEL


def total_memory(device: torch.device) -> int:
    """Total memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DEFAULT_MEMORY
