"""Short texts that tell weights and modules apart: where both are the same, two modules compute the same."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """32 hex digits for weights by name, the same on every device. It sums, as a hash of all bytes takes ten times as
    long. The first half is the sum of all 64-bit words (bytes, where their number is odd), all that earlier versions
    stored. The second is a hash of names, and of sums by row and by column: it changes if tensors, rows or columns
    change places."""
    total, digest = 0, sha256()
    for name, tensor in sorted(state.items()):
        t, size = tensor.detach(), tensor.element_size()
        in_rows = t.numel() > 0 and t.ndim > 1 and t.numel() // len(t) * size % 8 == 0
        words = t.reshape(len(t) if in_rows else 1, -1).contiguous()
        words = words.view(torch.int64 if t.numel() * size % 8 == 0 else torch.uint8)
        rows, columns = (words.sum(dim, dtype=torch.int64) for dim in (1, 0))
        total += int(rows.sum())
        digest.update(f"{name} {tuple(t.shape)}".encode())
        digest.update(torch.cat([rows, columns]).cpu().numpy().tobytes())
    return f"{total % 2**64:016x}{digest.hexdigest()[:16]}"


def construction(module: nn.Module) -> str:
    """16 hex digits of how a module is built: the kind of each of its parts, and their public settings, such as heads,
    the epsilon of a norm, the pooling, or the size of images."""
    lines = []
    for name, part in module.named_modules():
        settings = [(key, _plain(value)) for key, value in sorted(vars(part).items()) if key[0] != "_"]
        kept = [(key, value) for key, value in settings if value and key != "training"]
        lines.append(f"{name} {type(part).__module__}.{type(part).__qualname__} {kept}")
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def _plain(value: Any) -> str:
    """A setting as a text; "" for what is none, such as another module or a record."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_plain, value))})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return getattr(value, "__qualname__", "")
