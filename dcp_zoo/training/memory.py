"""Memory that a training step needs, and memory of the device."""

import os

import torch

from dcp_zoo.errors import check_choice
from dcp_zoo.model.dcp import DCP

CHECKPOINTING = ("auto", "on", "off")
VALUES_PER_CHANNEL = 14  # kept for the backward pass of one block, per token and channel of its width; measured
DEFAULT_MEMORY = 8 * 2**30  # bytes, assumed where the system does not report its memory


def needs_checkpointing(choice: str, model: DCP, batch: int) -> bool:
    """Whether to recompute the activations of a training step over `batch` images in the backward pass: "on", "off",
    or with "auto" if they would fill more than a quarter of the device's memory."""
    check_choice("grad_checkpointing", choice, CHECKPOINTING)
    return choice == "on" if choice != "auto" else activation_bytes(model, batch) > total_memory(model.device) / 4


def activation_bytes(model: DCP, batch: int) -> int:
    """Bytes that both towers would keep for the backward pass of a step."""
    vision, text = model.vision_tower, model.text_tower
    image_tokens = batch * (vision.num_tokens + model.config.n_ctx)
    name_tokens = sum(chunk.ids.numel() for chunk in model.name_tokens)
    channels = image_tokens * vision.width * len(vision.blocks) + name_tokens * text.width * len(text.blocks)
    return channels * vision.dtype.itemsize * VALUES_PER_CHANNEL


def total_memory(device: torch.device) -> int:
    """Total memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DEFAULT_MEMORY
