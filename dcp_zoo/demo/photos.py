"""Photographs that visitors bring: read under limits into memory, their files removed at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dcp_zoo.cli.predict import sample_images
from dcp_zoo.data import load_image
from dcp_zoo.errors import ZooError

MAX_FILE = "20mb"  # of one upload, in Gradio's notation
MAX_PIXELS = 50_000_000
Image.init()
FORMATS = tuple(  # none that PIL hands to other programs
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
)
UNKNOWN = f"not an image of a kind that is read here ({', '.join(FORMATS)})"
KEPT_SIDE = 672  # pixels of the short side that are kept: twice what the largest model reads


@dataclass(frozen=True)
class Photo:
    """One photograph: its file's name, and the upright RGB image, its short side at most `KEPT_SIDE`."""

    name: str
    image: Image.Image


def read_photo(path: str) -> Photo:
    """The photograph in a file; ZooError, naming the file without its folder, for one that is damaged or too large."""
    name = Path(path).name
    try:
        image = load_image(path, MAX_PIXELS, FORMATS)
    except ZooError as error:
        raise ZooError(str(error).replace(path, name).replace("not an image that PIL knows", UNKNOWN)) from error
    shrink = KEPT_SIDE / min(image.size)
    if shrink < 1:
        image = image.resize([max(KEPT_SIDE, round(side * shrink)) for side in image.size], Image.Resampling.BICUBIC)
    return Photo(name, image)


def read_uploads(paths: Iterable[str], room: int) -> tuple[list[Photo], list[str]]:
    """Uploaded files -> at most `room` photographs, and a message for each file that could not be taken.

    The files are removed whether they could be read or not.
    """
    photos: list[Photo] = []
    messages: list[str] = []
    left_out = 0
    for path in paths:
        try:
            if len(photos) < room:
                photos.append(read_photo(path))
            else:
                left_out += 1
        except ZooError as error:
            messages.append(str(error))
        finally:
            Path(path).unlink(missing_ok=True)
    if left_out:
        messages.append(f"{left_out} more left out: there is room for {room} here. Remove some first.")
    return photos, messages


def sample_photos() -> list[Photo]:
    """The two photographs that the page starts with."""
    return [read_photo(path) for path in sample_images()]
