"""From an item's path to a picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

from dcp_zoo.data.hub_datasets import HUB, read_row
from dcp_zoo.data.shards import SHARDS, read_member
from dcp_zoo.data.splits import DIGITS
from dcp_zoo.errors import ZooError


def load_image(path: str, max_pixels: int | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    """The image at `path` as RGB, upright by its EXIF orientation, transparency dropped as PIL's convert does. Of an
    animation it is the first frame.

    `max_pixels` and `formats` (PIL's names; default: all that it knows) are limits for files of strangers, checked
    before anything is decoded. Raises ZooError, naming the path, for a file that is missing, damaged, not an image or
    beyond the limits.
    """
    if path.startswith(DIGITS):
        return Image.fromarray(_digits()[int(path.removeprefix(DIGITS))]).convert("RGB")
    with _opened(path, formats) as image:
        if max_pixels and image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, and {max_pixels:,} are the limit")
        return ImageOps.exif_transpose(image).convert("RGB")


def check_header(path: str) -> None:
    """Raise ZooError for a file that does not begin like an image; nothing is decoded, so that it is fast."""
    if not path.startswith(DIGITS):
        with _opened(path):
            pass


@contextmanager
def _opened(path: str, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """The image, not yet decoded; whatever goes wrong with it while it is open becomes a ZooError."""
    try:
        with Image.open(_file(path), formats=formats) as image:
            yield image
    except FileNotFoundError:
        raise ZooError(f"No image at {path}: check the path, or restore the file from its dataset.") from None
    except Exception as error:  # decoders meet damaged files with almost any exception
        reason = "not an image that PIL knows" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ZooError(f"Cannot read the image {path}: {reason}. Replace the file, or leave it out.") from error


def _file(path: str) -> str | BytesIO:
    """What PIL can open: the path itself, or the bytes where it leads into a dataset of the Hub or a shard."""
    for scheme, read in ((HUB, read_row), (SHARDS, read_member)):
        if path.startswith(scheme):
            return BytesIO(read(path))
    return path


@cache
def _digits() -> Any:
    """scikit-learn's digits, (1797, 8, 8) grey levels 0..255."""
    import numpy as np
    from sklearn.datasets import load_digits

    return (load_digits().images * (255 / 16)).round().astype(np.uint8)
