"""Uploaded photographs: read into memory within limits, their files removed at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dcp_zoo.data import load_image
from dcp_zoo.data.formats import untrusted
from dcp_zoo.data.images import UNSUPPORTED
from dcp_zoo.data.samples import sample_images
from dcp_zoo.errors import ZooError

MAX_FILE = "20mb"  # of one upload, in Gradio's notation
MAX_PIXELS = 50_000_000
WRONG_FORMAT = f"not an image in a supported format ({', '.join(untrusted())})"
KEPT_SIDE = 672  # pixels to which a larger short side is resized: twice the input of the largest model


@dataclass(frozen=True)
class Photo:
    """One photograph: its file name, and the upright RGB image with a short side of at most `KEPT_SIDE`."""

    name: str
    image: Image.Image


def read_photo(path: str) -> Photo:
    """Read a photograph; ZooError, naming the file without its folder, if it is damaged or too large."""
    name = Path(path).name
    try:
        image = load_image(path, MAX_PIXELS, untrusted())
    except ZooError as error:
        raise ZooError(str(error).replace(path, name).replace(UNSUPPORTED, WRONG_FORMAT)) from error
    shrink = KEPT_SIDE / min(image.size)
    if shrink < 1:
        image = image.resize([max(KEPT_SIDE, round(side * shrink)) for side in image.size], Image.Resampling.BICUBIC)
    return Photo(name, image)


def read_uploads(paths: Iterable[str], limit: int) -> tuple[list[Photo], list[str]]:
    """Uploaded files -> at most `limit` photographs, and messages about files that were not used.

    All files are removed, even unreadable ones.
    """
    photos: list[Photo] = []
    messages: list[str] = []
    skipped = 0
    for path in paths:
        try:
            if len(photos) < limit:
                photos.append(read_photo(path))
            else:
                skipped += 1
        except ZooError as error:
            messages.append(str(error))
        finally:
            Path(path).unlink(missing_ok=True)
    if skipped:
        messages.append(f"Skipped {skipped}: only {limit} more fit here. Remove some first.")
    return photos, messages


def sample_photos() -> list[Photo]:
    """The two photographs shown initially."""
    return [read_photo(path) for path in sample_images()[:2]]
