"""Items as a torch dataset: decoded once, transformed on every read."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from dcp_zoo.data.images import grey_copy, in_threads, load_image
from dcp_zoo.data.splits import Item

CPU = torch.device("cpu")
CACHE_BYTES = 2**30  # decoded images of one dataset are cached up to this size
AT_ONCE = 64  # images that are decoded in advance
Copies = dict[str, Image.Image]  # small ones, see `grey_copy`, by the path of the image


class Decoded(dict[int, Image.Image | torch.Tensor]):
    """Decoded images by position, up to so many bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def add(self, index: int, image: Image.Image | torch.Tensor) -> None:
        size = image.nbytes if isinstance(image, torch.Tensor) else 3 * image.width * image.height
        if size <= self.room and index not in self:
            self.room -= size
            self[index] = image


class ImageDataset(Dataset):
    """Items as (transform(image), label) pairs, for a torch DataLoader: decoded once, on all cores, and kept up to
    `cache_bytes`; then transformed, for torchvision's v2 as a uint8 tensor (3, H, W). `copies` receives the `grey_copy`
    of each file that this process decodes, by its path. ZooError as of `load_image`."""

    _seeds: Sequence[int] | None = None
    _mirrored: Sequence[int] | None = None

    def __init__(
        self,
        items: Sequence[Item],
        transform: Callable[..., torch.Tensor],
        cache_bytes: int = CACHE_BYTES,
        copies: Copies | None = None,
    ) -> None:
        from torchvision.transforms import v2  # slow to import

        self.items, self.transform, self.copies = items, transform, copies
        self._tensors = isinstance(transform, v2.Transform)
        self._decoded = Decoded(cache_bytes)

    def drawn(self, seeds: Sequence[int] | None, mirrored: Sequence[int]) -> "ImageDataset":
        """The same items, decoded once for both, of which those that are `mirrored` are so after the transform. With
        `seeds`, one per item, the result depends neither on the images read before nor on the process that reads it."""
        other = copy.copy(self)
        other._seeds, other._mirrored = seeds, mirrored
        return other

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """A batch, called by DataLoader. Only decoding is parallel: random transforms keep their order."""
        images = self._read([index for index in indices if index not in self._decoded])
        return [self._transformed(images[i] if i in images else self._decoded[i], i) for i in indices]

    def decode(self) -> None:
        """Decode all images once before any is needed, so that an error comes early, and their hashes are known."""
        for start in range(0, len(self), AT_ONCE):
            self._read(range(start, min(start + AT_ONCE, len(self))))

    def _read(self, indices: Sequence[int]) -> dict[int, Image.Image | torch.Tensor]:
        """Decoded images by position, which are kept where there is room."""
        read = map if get_worker_info() else in_threads  # a worker process of DataLoader has its own core
        images = dict(zip(indices, read(self._load, indices), strict=True))
        for index, image in images.items():
            self._decoded.add(index, image)
        return images

    def _load(self, index: int) -> Image.Image | torch.Tensor:
        image = load_image(path := self.items[index].path)
        if self.copies is not None and isinstance(path, str):
            self.copies[path] = grey_copy(image)
        return pil_to_tensor(image) if self._tensors else image

    def _transformed(self, image: Image.Image | torch.Tensor, index: int) -> tuple[torch.Tensor, int]:
        with nullcontext() if self._seeds is None else seeded(self._seeds[index]):
            x = self.transform(image)
        return x.flip(-1) if self._mirrored and self._mirrored[index] else x, self.items[index].label


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """A context in which Python, NumPy and torch, here and on this device, draw from this seed; then as before."""
    accelerator = None if device.type == "cpu" else getattr(torch, device.type, None)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before_there = accelerator and accelerator.get_rng_state(device)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if accelerator:  # `manual_seed` is for the current GPU, which may be another; there is one "mps" only
        with accelerator.device(device) if hasattr(accelerator, "device") else nullcontext():
            accelerator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if accelerator:
            accelerator.set_rng_state(before_there, device)
