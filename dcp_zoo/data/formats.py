"""Image formats: suffixes of image files, and what PIL reads."""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image

from dcp_zoo.errors import ZooError

IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .bmp .gif .ppm .pgm .tif .tiff .webp .avif .heic .heif".split())
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".m4v", ".mpg", ".mpeg", ".webm", ".wmv", ".3gp")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # bytes 8 to 12 of a file


@cache
def picture_formats() -> tuple[str, ...]:
    """PIL's names of the formats that are read, from users and strangers alike: none for which PIL runs other programs,
    as it does for EPS. HEIC is among them if its plugin is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()  # imports every plugin
    names = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    return tuple(name for name in names if name in Image.OPEN)


def is_heif(start: bytes) -> bool:
    """Whether a file starts like HEIC, whatever its suffix: phones and web sites also call such files .jpg."""
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


def is_image(file: str) -> bool:
    """Whether a file is an image of the user's own, by its name."""
    return file.lower().endswith(IMAGE_SUFFIXES) and is_visible(file)


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's own: not hidden, nor what macOS adds to zip files."""
    return not name.startswith(".") and name != "__MACOSX"


def visible_files(folder: str | Path) -> Iterator[str]:
    """The paths of the user's own files in a folder and its subfolders, sorted within each; ZooError for one that
    cannot be listed."""

    def cannot_list(error: OSError) -> None:
        raise ZooError(f"Cannot list {error.filename}: {error.strerror}.") from error

    for place, folders, files in os.walk(str(folder), onerror=cannot_list):
        folders[:] = sorted(filter(is_visible, folders))
        yield from (os.path.join(place, file) for file in sorted(filter(is_visible, files)))  # noqa: PTH118
