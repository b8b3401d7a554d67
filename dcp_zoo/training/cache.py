"""Patch maps and features of a frozen image tower, kept from fit to fit: by image, weights and preprocessing."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dcp_zoo.data import Item
from dcp_zoo.files import write_file

LIMIT = 2**29  # bytes in memory


class FeatureCache:
    """Tensors by key: in memory the most recent ones up to `limit` bytes, and all of them in a folder, if there is one.

    The folder is never cleaned: delete it.
    """

    def __init__(self, folder: str | os.PathLike | None = None, limit: int = LIMIT) -> None:
        self.folder, self.limit = None if folder is None else Path(folder), limit
        self.kept: OrderedDict[str, Tensor] = OrderedDict()
        self.size, self.lock = 0, threading.Lock()

    def get(self, key: str) -> Tensor | None:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        if self.folder is None or not (file := self.folder / key).is_file():
            return None
        try:
            found = torch.load(file, weights_only=True)
        except Exception:  # a damaged file is computed again
            return None
        self._keep(key, found)
        return found

    def put(self, key: str, value: Tensor) -> None:
        self._keep(key, value := value.clone())  # not a view, which would keep its whole batch
        if self.folder is not None:
            write_file(self.folder / key, lambda path: torch.save(value, path), "choose another memory=")

    def _keep(self, key: str, value: Tensor) -> None:
        with self.lock:
            if key not in self.kept:
                self.kept[key] = value
                self.size += value.nbytes
            while self.size > self.limit:
                self.size -= self.kept.popitem(last=False)[1].nbytes


_active: ContextVar[FeatureCache | None] = ContextVar("feature cache", default=None)
_caches: dict[Path | None, FeatureCache] = {}  # by folder


@contextmanager
def kept_features(folder: str | os.PathLike | None = None) -> Iterator[None]:
    """Inside this context `by_item` keeps what it computes for later contexts with the same folder, or with none."""
    place = None if folder is None else Path(folder).expanduser().absolute()
    token = _active.set(_caches.setdefault(place, FeatureCache(place)))
    try:
        yield
    finally:
        _active.reset(token)


def by_item(
    items: Sequence[Item], setting: Callable[[], str], views: int, compute: Callable[[Sequence[int]], Tensor]
) -> Tensor:
    """Tensors (views, n, ...) of the items: `compute` of all, or inside `kept_features` of those that are not kept.

    Args:
        items: the n items.
        setting: what the tensors depend on besides the images.
        views: of each image; view 0 is the same with one view and with two.
        compute: tensors (views, m, ...) of m items, which are given by their position, on the CPU.
    """
    cache = _active.get()
    images = [image_key(item.path) for item in items] if cache else []
    if cache is None or "" in images:
        return compute(range(len(items)))
    name = setting()
    keys = [[sha256(f"{name} {image} {view}".encode()).hexdigest() for view in range(views)] for image in images]
    rows: list[Any] = [[cache.get(key) for key in own] for own in keys]
    if missing := [i for i, row in enumerate(rows) if any(part is None for part in row)]:
        for i, parts in zip(missing, compute(missing).unbind(1), strict=True):
            rows[i] = list(parts)
            for key, part in zip(keys[i], parts, strict=True):
                cache.put(key, part)
    return torch.stack([torch.stack([row[view] for row in rows]) for view in range(views)])


def image_key(image: Any) -> str:
    """What tells one image from another: the path, time and size of a file, or the content of one in memory; "" for
    what could change unnoticed."""
    if isinstance(image, Image.Image):
        return sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
    try:
        found = Path(image).stat()
    except OSError:
        return ""
    return f"{Path(image).absolute()} {found.st_mtime_ns} {found.st_size}"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A fast fingerprint of weights: the sum of their 64-bit words, or of bytes if the size is not a multiple of 8."""
    total = 0
    for t in tensors:
        flat = t.detach().reshape(-1)
        in_words = flat.numel() * flat.element_size() % 8 == 0
        total += int(flat.view(torch.int64 if in_words else torch.uint8).sum(dtype=torch.int64))
    return f"{total % 2**64:016x}"


def tower_setting(model: Any, what: str) -> str:
    """What features of a frozen image tower depend on besides the images."""
    state = model.visual.state_dict().values()
    return f"{what} {fingerprint(state)} {model.device.type} {sorted(map(str, model.pretrained_cfg.items()))}"
