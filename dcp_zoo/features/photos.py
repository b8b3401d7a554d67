"""Photographs: decoded once, on all cores, by their positions. Without torch."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dcp_zoo.data import Item
from dcp_zoo.data.images import Facts, ImageLike, crop, load_image, load_with_facts, pixels_sha256
from dcp_zoo.errors import ZooError, attempted
from dcp_zoo.fields import Values
from dcp_zoo.files import MAX_PIXELS, file_state
from dcp_zoo.threads import available_cores

T = TypeVar("T")
CACHE_BYTES = 2**30  # of decoded images that are read again and again
AHEAD = 2  # batches that are decoded while one is computed


def pixels_of(image: ImageLike, preprocessing: Values, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image, see `load_image` -> its pixels, uint8 (3, H, W), by timm's `preprocessing`: exactly the
    transform's before they are normalised; such pixels stay as they are. It needs no model, so it can
    run in another process. ZooError as of `load_image`."""
    if _is_cropped(image, preprocessing):
        return image
    with _enough_memory_for(image):
        return crop(load_image(image, max_pixels), preprocessing)


def _is_cropped(image: ImageLike, preprocessing: Values) -> bool:
    """Whether an image is already what `pixels_of` returns."""
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
    return is_array and image.shape == tuple(preprocessing["input_size"])


@contextmanager
def _enough_memory_for(image: ImageLike) -> Iterator[None]:
    """ZooError, naming the image, where reading it takes more memory than is left."""
    try:
        yield
    except MemoryError:
        raise ZooError(f"{image} is too large for the memory that is left.") from None


class Photos:
    """The images of items, in order.

    Args:
        items: whose images are read.
        keep: bytes of decoded images that stay in memory, for whoever reads them again and again.
        facts: where the facts of each image (a grey copy, when it was taken, its hash) are put once it
            is decoded.

    Attributes:
        facts: by the items' keys; None if they are not collected.
    """

    def __init__(self, items: Sequence[Item], keep: int = 0, facts: dict[str, Facts] | None = None) -> None:
        self.items = items
        self.facts = facts
        self._capacity = keep  # bytes that are left
        self._decoded: dict[int, Image.Image] = {}
        self._keys: list[str] | None = None

    @classmethod
    def of_images(cls, images: Sequence[ImageLike]) -> "Photos":
        """Images without labels."""
        return cls([Item(image, "", 0) for image in images])

    def __len__(self) -> int:
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Of the decoded images that are kept."""
        return sum(3 * image.width * image.height for image in self._decoded.values())

    @property
    def keys(self) -> list[str]:
        """Of each image, see `image_key`."""
        if self._keys is None:
            self._keys = [image_key(item.path) for item in self.items]
        return self._keys

    def with_items(self, items: Sequence[Item]) -> "Photos":
        """The same images with other labels or groups."""
        other = copy.copy(self)
        other.items = items
        return other

    def of(self, positions: Sequence[int]) -> "Photos":
        """The images at these positions."""
        part = Photos([self.items[i] for i in positions], self._capacity, self.facts)
        for i, position in enumerate(positions):
            if position in self._decoded:
                part._decoded[i] = self._decoded[position]
        return part

    def load(self, position: int) -> Image.Image:
        """An image, decoded; ZooError as of `load_image`."""
        if position in self._decoded:
            return self._decoded[position]
        item = self.items[position]
        if self.facts is None:
            image = load_image(item.path)
        else:
            image, self.facts[item.key] = load_with_facts(item.path)
        size = 3 * image.width * image.height
        if size <= self._capacity:
            self._capacity -= size
            self._decoded[position] = image
        return image

    def pixels(self, position: int, preprocessing: Values) -> np.ndarray:
        """An image as `pixels_of` makes it."""
        image = self.items[position].path
        if _is_cropped(image, preprocessing):
            return image
        with _enough_memory_for(image):
            return crop(self.load(position), preprocessing)

    def facts_of(self, position: int) -> Facts:
        """The facts of an image, which is read if they are not known."""
        item = self.items[position]
        if self.facts and item.key in self.facts:
            return self.facts[item.key]
        return load_with_facts(item.path)[1]

    def batches(
        self, positions: Sequence[int], size: int, read: Callable[[int], T]
    ) -> Iterator[tuple[Sequence[int], list[T | ZooError]]]:
        """Batches of positions, and what `read` returns for each, or the error of an image that cannot
        be read. Threads read ahead of the caller: PIL works outside the interpreter lock."""
        pool = ThreadPoolExecutor(available_cores())
        waiting = deque[tuple[Sequence[int], Iterator[Any]]]()
        try:
            for start in range(0, len(positions), size):
                batch = positions[start : start + size]
                waiting.append((batch, pool.map(lambda i: attempted(read, i), batch)))
                if len(waiting) > AHEAD:
                    done, results = waiting.popleft()
                    yield done, list(results)
            for done, results in waiting:
                yield done, list(results)
        finally:
            pool.shutdown(cancel_futures=True)


def image_key(image: ImageLike) -> str:
    """A text that no other image has: of a file its path, time and size, of bytes their hash, and of
    another image in memory the hash of its pixels. "" for a file that is missing, and an image that
    cannot be read."""
    if isinstance(image, bytes):
        return sha256(image).hexdigest()  # which decodes nothing
    if not isinstance(image, (str, Path)):
        key = attempted(pixels_sha256, image)
        return "" if isinstance(key, ZooError) else key
    state = file_state(image)
    return "" if state is None else f"{Path(image).absolute()} {state}"
