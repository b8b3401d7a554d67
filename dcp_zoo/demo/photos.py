"""Uploaded photographs: read into memory within limits, their files removed at once."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from dcp_zoo.data import load_image, load_split
from dcp_zoo.data.images import decode_image
from dcp_zoo.data.packaged import SAMPLE_CLASSES, sample_images
from dcp_zoo.data.paths import IMAGE_SUFFIXES
from dcp_zoo.errors import ZooError

MAX_FILE = "20mb"  # of one upload, in Gradio's notation
MAX_PHOTO = 50_000_000  # pixels
KEPT_SIDE = 448  # pixels to which a larger short side is resized: more than the input of the largest model
KEPT_PIXELS = 4 * KEPT_SIDE**2  # to which longer images are resized
Uploads = list[str] | str | None  # paths; of the webcam, one


@dataclass(frozen=True)
class Photo:
    """One photograph."""

    name: str  # of its file
    image: Image.Image  # upright, RGB, with a short side of at most `KEPT_SIDE`, and at most `KEPT_PIXELS`
    truth: str | None = None  # the class that it shows, if that is known

    @property
    def bytes(self) -> int:
        """The memory it takes: PIL has four bytes per pixel."""
        return 4 * self.image.width * self.image.height


def read_photo(path: str) -> Photo:
    """Read a photograph; ZooError, naming the file without its folder, if it is damaged or too large."""
    name = Path(path).name
    image = decode_image(Path(path).read_bytes(), name, MAX_PHOTO)
    shrink = min(KEPT_SIDE / min(image.size), (KEPT_PIXELS / (image.width * image.height)) ** 0.5)
    if shrink < 1:
        image = image.resize([round(side * shrink) for side in image.size], Image.Resampling.BICUBIC)
    return Photo(name, image)


def read_uploads(
    files: Uploads, limit: int, folder: bool = False, room: float = float("inf")
) -> tuple[list[Photo], list[str]]:
    """Uploaded files -> at most `limit` photographs in `room` bytes, and messages about files that were not used.

    Of a folder's files, only the images are read, in the order of their names. All files are removed, even unreadable
    ones.
    """
    paths = [files] if isinstance(files, str) else files or []
    images = sorted(path for path in paths if Path(path).suffix.lower() in IMAGE_SUFFIXES) if folder else list(paths)
    photos: list[Photo] = []
    messages: list[str] = []
    if folder and not images:
        messages.append(f"No images in this folder: their names must end in {', '.join(IMAGE_SUFFIXES)}.")
    try:
        while images and len(photos) < limit and room > 0:
            try:
                photos.append(read_photo(images.pop(0)))
                room -= photos[-1].bytes
            except ZooError as error:
                messages.append(str(error))
    finally:
        for path in paths:
            Path(path).unlink(missing_ok=True)
    if images:
        fit = f"only {len(photos)} more fit" if photos else "no more fit"
        messages.append(f"Skipped {len(images)}: {fit} here. Remove some first.")
    return photos, messages


def sample_photos() -> list[Photo]:
    """The six photographs shown initially."""
    return [replace(read_photo(path), truth=name) for path, name in zip(sample_images(), SAMPLE_CLASSES, strict=False)]


def digit_photos(part: str, digits: Iterable[int], n: int) -> dict[str, list[Photo]]:
    """The first `n` images of handwritten digits in a part of scikit-learn's, "train" or "test", by digit."""
    photos: dict[str, list[Photo]] = {str(digit): [] for digit in digits}
    for item in getattr(load_split("digits"), part):
        name = str(item.label)
        if len(photos.get(name, range(n))) < n:
            photos[name].append(Photo(f"{name}_{item.key}.png", load_image(item.path), name))
    return photos
