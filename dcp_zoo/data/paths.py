"""What a path stands for, by its name: an image, a video, or another file."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image

from dcp_zoo.errors import ZooError, shorten, warn, writing_to
from dcp_zoo.files import check_regular, check_writable

IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .bmp .gif .ppm .pgm .tif .tiff .webp .avif .heic .heif".split())
KNOWN = ", ".join(IMAGE_SUFFIXES)
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".m4v", ".mpg", ".mpeg", ".webm", ".wmv", ".3gp")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # bytes 8 to 12 of a file


@cache
def picture_formats() -> tuple[str, ...]:
    """PIL's formats that are read: none for which it runs other programs, as for EPS; HEIC if its plugin is there."""
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


def check_output(file: Path, overwrite: bool, option: str = "--output") -> None:
    """ZooError for an output file that cannot be written, or exists, unless `overwrite` and no image or archive."""
    advice = f"choose another {option}"
    if os.path.lexists(file):
        with writing_to(file, advice), suppress(FileNotFoundError):  # a link to nothing
            check_regular(file)
        valued = *IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *ARCHIVE_SUFFIXES
        precious = os.path.realpath(file).lower().endswith(valued)
        if precious or not overwrite:
            raise ZooError(f"{file} exists already: {advice}{'' if precious else ', or pass --overwrite'}.")
    check_writable(file.parent, advice)


def check_outside(place: Path, images: str | Path, option: str) -> None:
    """ZooError for an output folder in a folder of images: the next run would find the copies there."""
    if Path(images).is_dir() and place.resolve().is_relative_to(Path(images).resolve()):
        raise ZooError(f"{place} is among the images of {images}: choose a folder elsewhere for {option}.")


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's own: not hidden, nor added by macOS to archives or Windows to folders."""
    return not name.startswith(".") and name.lower() not in ("__macosx", "thumbs.db", "desktop.ini")


def visible_files(folder: str | Path) -> Iterator[str]:
    """The user's own files in a folder and its subfolders, sorted within each; ZooError if one cannot be listed. Links
    to folders, which may lead back here, are not followed: a warning names them."""

    def cannot_list(error: OSError) -> None:
        raise ZooError(f"Cannot list {error.filename}: {error.strerror}.") from error

    for place, folders, files in os.walk(str(folder), onerror=cannot_list):
        folders[:] = sorted(filter(is_visible, folders))
        for linked in filter(os.path.islink, (os.path.join(place, each) for each in folders)):  # noqa: PTH118
            warn(f"{linked} is a link to a folder, and is not read: pass it itself.")
        yield from (os.path.join(place, file) for file in sorted(filter(is_visible, files)))  # noqa: PTH118


def kind_of(file: str) -> str:
    """What a file that is no image is called in messages: its suffix, or its name if it has none."""
    return Path(file).suffix.lower() or Path(file).name


def counted(kinds: Counter[str]) -> str:
    """Such as "3 .mov, 1 .txt"."""
    return shorten([f"{count:,} {kind}" for kind, count in kinds.most_common()])


def warn_of_skipped(folder: str | Path, kinds: Counter[str]) -> None:
    """Warn of files that are not read, if there are any."""
    if kinds:
        warn(f"Ignored in {folder}: {counted(kinds)}.")
