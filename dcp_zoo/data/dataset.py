"""Items as a torch dataset: decoded once, transformed every time."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from dcp_zoo.data.images import load_image
from dcp_zoo.data.splits import Item

CACHE_BYTES = 2**30  # decoded images of one dataset are kept up to this size


class ImageDataset(Dataset):
    """Items as (transform(image), label) pairs, for a torch DataLoader. Raises ZooError where `load_image` does.

    Every file is decoded once: decoded images are kept up to `cache_bytes`, and a batch's new ones are decoded by all
    cores. The transform runs on the image as ever, so that kept and fresh images come out alike: a PIL image, or a
    uint8 tensor (3, H, W) for a transform of `torchvision.transforms.v2`, which is faster on these.

    Attributes:
        seeds: one for every item, of what its transform draws, which then depends neither on the images before it nor
            on the process that reads it. None: the transform draws from the process's random numbers.
    """

    seeds: Sequence[int] | None = None

    def __init__(
        self, items: Sequence[Item], transform: Callable[[Image.Image], Any], cache_bytes: int = CACHE_BYTES
    ) -> None:
        from torchvision.transforms import v2  # takes time: not for those who only import

        self.items, self.transform = items, transform
        self._tensors = isinstance(transform, v2.Transform)
        self._decoded: dict[int, Any] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._decoded.get(index)
        if image is None:
            image = self._keep(index, self._load(index))
        return self._transformed(image, index)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """A batch, as DataLoader asks for it. Only decoding is parallel: random transforms keep their order."""
        if get_worker_info() is not None:  # a process of DataLoader's, which has its own core
            return [self[index] for index in indices]
        new = [index for index in indices if index not in self._decoded]
        images = dict(zip(new, _decoders().map(self._load, new), strict=True))
        for index, image in images.items():
            self._keep(index, image)
        return [self._transformed(images[i] if i in images else self._decoded[i], i) for i in indices]

    def _load(self, index: int) -> Any:
        image = load_image(self.items[index].path)
        return pil_to_tensor(image) if self._tensors else image

    def _transformed(self, image: Any, index: int) -> tuple[Any, int]:
        with nullcontext() if self.seeds is None else _seeded(self.seeds[index]):
            return self.transform(image), self.items[index].label

    def _keep(self, index: int, image: Any) -> Any:
        size = image.nbytes if self._tensors else 3 * image.width * image.height
        if size <= self._room:
            self._room -= size
            self._decoded[index] = image
        return image


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """While it is open, random transforms draw from a stream of their own: torchvision's from torch's random numbers,
    timm's from Python's too."""
    before = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])


@cache
def _decoders() -> ThreadPoolExecutor:
    """Threads that decode: PIL lets go of the interpreter lock while it does."""
    return ThreadPoolExecutor(thread_name_prefix="decode", max_workers=os.cpu_count())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_decoders.cache_clear)  # a forked process has none of its parent's threads
