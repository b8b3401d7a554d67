"""Items as a torch dataset: decoded once, transformed on every read."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from dcp_zoo.data.images import in_threads, load_image
from dcp_zoo.data.splits import Item

CACHE_BYTES = 2**30  # decoded images of one dataset are cached up to this size


class ImageDataset(Dataset):
    """Items as (transform(image), label) pairs, for a torch DataLoader. Raises ZooError where `load_image` does.

    Every file is decoded once, on all cores, and kept up to `cache_bytes`; then transformed, as a PIL image or, for a
    transform of `torchvision.transforms.v2`, which is faster on tensors, as a uint8 tensor (3, H, W). With `seeds`, one
    per item, the result depends neither on the images read before nor on the process that reads it. Items that are
    `mirrored` are so after the transform.
    """

    seeds: Sequence[int] | None = None
    mirrored: Sequence[int] | None = None

    def __init__(self, items: Sequence[Item], transform: Callable[..., Any], cache_bytes: int = CACHE_BYTES) -> None:
        from torchvision.transforms import v2  # slow to import

        self.items, self.transform = items, transform
        self._tensors = isinstance(transform, v2.Transform)
        self._decoded: dict[int, Image.Image | torch.Tensor] = {}
        self._cache_left = cache_bytes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """A batch, called by DataLoader. Only decoding is parallel: random transforms keep their order."""
        new = [index for index in indices if index not in self._decoded]
        read = map if get_worker_info() else in_threads  # a worker process of DataLoader has its own core
        images = dict(zip(new, read(self._load, new), strict=True))
        for index, image in images.items():
            size = image.nbytes if isinstance(image, torch.Tensor) else 3 * image.width * image.height
            if size <= self._cache_left:
                self._cache_left -= size
                self._decoded[index] = image
        return [self._transformed(images[i] if i in images else self._decoded[i], i) for i in indices]

    def _load(self, index: int) -> Image.Image | torch.Tensor:
        image = load_image(self.items[index].path)
        return pil_to_tensor(image) if self._tensors else image

    def _transformed(self, image: Image.Image | torch.Tensor, index: int) -> tuple[Any, int]:
        with nullcontext() if self.seeds is None else _seeded(self.seeds[index]):
            x = self.transform(image)
        return x.flip(-1) if self.mirrored and self.mirrored[index] else x, self.items[index].label


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A context in which random transforms draw from a separate stream: torchvision's from torch's random state,
    timm's from Python's too."""
    before = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])
