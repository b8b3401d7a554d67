"""Photographs: decoded once, on all cores, by their positions. Without torch."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcp_zoo.data import Facts, ImageLike, Item, crop, load_image, load_with_facts, pixels_sha256
from dcp_zoo.errors import ZooError, attempted
from dcp_zoo.fields import Values
from dcp_zoo.files import MAX_PIXELS, file_state

CACHE_BYTES = 2**30  # of decoded images that are read again and again


def pixels_of(
    image: ImageLike,
    preprocessing: Values,
    max_pixels: int = MAX_PIXELS,
    load: Callable[[], Image.Image] | None = None,
) -> np.ndarray:
    """An image, see `load_image` -> its pixels, uint8 (3, H, W), by timm's `preprocessing`: exactly the
    transform's before they are normalised; such pixels stay as they are. It needs no model, so it can
    run in another process. ZooError as of `load_image`, in whose place another function may `load` it."""
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if is_array and image.shape == tuple(preprocessing["input_size"]):
        return image
    return crop(load() if load else load_image(image, max_pixels), preprocessing)


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
        self._capacity = [keep]  # bytes that are left: in a list, as copies share it like the images
        # by the id of what an image was read from, which is kept beside it, as ids of what is gone are used again
        self._decoded: dict[int, tuple[Any, Image.Image]] = {}

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def keys(self) -> list[str]:
        """Of each image, see `image_key`."""
        return [image_key(item.path) for item in self.items]

    def with_items(self, items: Sequence[Item]) -> "Photos":
        """The same images with other labels or groups."""
        other = copy.copy(self)
        other.items = items
        return other

    def of(self, positions: Sequence[int]) -> "Photos":
        """The images at these positions."""
        part = self.with_items([self.items[i] for i in positions])
        part.keys = [self.keys[i] for i in positions]
        return part

    def load(self, position: int) -> Image.Image:
        """An image, decoded; ZooError as of `load_image`."""
        item = self.items[position]
        if id(item.path) in self._decoded:
            return self._decoded[id(item.path)][1]
        if self.facts is None:
            image = load_image(item.path)
        else:
            image, self.facts[item.key] = load_with_facts(item.path)
        size = 3 * image.width * image.height
        if size <= self._capacity[0]:
            self._capacity[0] -= size
            self._decoded[id(item.path)] = item.path, image
        return image

    def pixels(self, position: int, preprocessing: Values) -> np.ndarray:
        """An image as `pixels_of` makes it."""
        return pixels_of(self.items[position].path, preprocessing, load=partial(self.load, position))

    def facts_of(self, position: int) -> Facts:
        """The facts of an image, which is read if they are not known."""
        item = self.items[position]
        known = self.facts or {}
        return known.get(item.key) or load_with_facts(item.path)[1]


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
