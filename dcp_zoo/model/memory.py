"""How much memory a training step takes, and how much there is."""

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP

MEMORIES = ("auto", "fast", "low")
NUMBERS_PER_CHANNEL = 14  # that the backward pass of one block keeps for a token, per channel of its width; measured
UNKNOWN_TOTAL = 8 * 2**30  # assumed where a system does not tell


def needs_recompute(model: "DCP", images: torch.Tensor) -> bool:
    """Whether the backward pass of a step over `images` should compute activations again; see `DCP.memory`."""
    if model.memory != "auto":
        return model.memory == "low"
    if torch.compiler.is_compiling():
        return False  # the compiler decides by itself, and a look at the batch size would fix it in an export
    return activation_bytes(model, len(images)) > total_memory(images.device) / 4


def activation_bytes(model: "DCP", batch: int) -> int:
    """What both towers would keep for the backward pass of a step."""
    positions, name_positions = model.visual.positional_embedding, model.text.positional_embedding
    image_tokens = batch * (len(positions) + model.n_ctx)
    name_tokens = sum(len(chunk.ids) for chunk in model.names)
    channels = image_tokens * positions.shape[1] * len(model.vision_blocks)
    channels += name_tokens * name_positions.shape[1] * len(model.text_blocks)
    return channels * positions.element_size() * NUMBERS_PER_CHANNEL


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return UNKNOWN_TOTAL
