"""From an item's path to a picture."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from dcp_zoo.data.splits import DIGITS, Item
from dcp_zoo.errors import ZooError


def load_image(path: str) -> Image.Image:
    """The image at `path` as RGB, upright by its EXIF orientation, transparency dropped as PIL's convert does.

    Raises ZooError, naming the path, for a file that is missing, damaged or not an image.
    """
    if path.startswith(DIGITS):
        return Image.fromarray(_digits()[int(path.removeprefix(DIGITS))]).convert("RGB")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ZooError(f"No image at {path}: check the path, or restore the file from its data set.") from None
    except Exception as error:  # decoders meet damaged files with almost any exception
        reason = "not an image that PIL knows" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ZooError(
            f"Cannot read the image {path}: {reason}. Replace the file, or remove it from the data set."
        ) from error


@cache
def _digits() -> np.ndarray:
    """scikit-learn's digits, (1797, 8, 8) grey levels 0..255."""
    from sklearn.datasets import load_digits

    return (load_digits().images * (255 / 16)).round().astype(np.uint8)


class ImageDataset(Dataset):
    """Items as (transform(image), label) pairs, for a torch DataLoader. Raises ZooError where `load_image` does."""

    def __init__(self, items: Sequence[Item], transform: Callable[[Image.Image], Any]) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self.items[index]
        return self.transform(load_image(item.path)), item.label
