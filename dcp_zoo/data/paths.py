"""What a path stands for, by its name: an image, what belongs to one, an archive, or another file."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from dcp_zoo.errors import ZooError, as_zoo_error, shorten, warn, writing_to
from dcp_zoo.files import check_regular, check_writable

IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .bmp .gif .ppm .pgm .tif .tiff .webp .avif .heic .heif".split())
KNOWN = ", ".join(IMAGE_SUFFIXES)
RAW_SUFFIXES = tuple(
    ".3fr .arw .cr2 .cr3 .crw .dng .erf .kdc .mef .nef .nrw .orf .pef .raf .rw2 .rwl .srw .x3f".split()
)
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".m4v", ".mpg", ".mpeg", ".webm", ".wmv", ".3gp")
COMPANIONS = (*RAW_SUFFIXES, *VIDEO_SUFFIXES, *".xmp .aae .dop .pp3 .thm .wav".split())  # of an image of their name
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


@cache
def image_suffixes() -> tuple[str, ...]:
    """Those of the images that are read: of RAW files, if rawpy is there."""
    return IMAGE_SUFFIXES + (RAW_SUFFIXES if find_spec("rawpy") else ())


def is_raw(file: str) -> bool:
    """Whether a file is a camera's RAW file, by its name."""
    return file.lower().endswith(RAW_SUFFIXES)


def is_image(file: str) -> bool:
    """Whether a file is an image of the user's own, by its name."""
    return file.lower().endswith(image_suffixes()) and is_visible(file)


def one_per_photo(files: Iterable[str]) -> list[str]:
    """The files without the RAW files beside which there is an image of the same name: both are one photograph."""
    files = list(files)
    developed = {os.path.splitext(file)[0] for file in files if file.lower().endswith(IMAGE_SUFFIXES)}  # noqa: PTH122
    return [file for file in files if not (is_raw(file) and os.path.splitext(file)[0] in developed)]  # noqa: PTH122


def companions(folder: Path) -> dict[str, list[str]]:
    """Of each image in a folder, by names, the files that belong to it: its RAW file, the video of a live photo, and
    its sidecars, such as `a.jpg.xmp`, `a.xmp`, and `a_01.jpg.xmp` of darktable's duplicates."""
    with as_zoo_error(f"Cannot list {folder}: {{}}.", OSError):
        names = sorted(entry.name for entry in os.scandir(folder) if is_visible(entry.name) and entry.is_file())
    images = one_per_photo(filter(is_image, names))
    owners = {Path(name).stem: name for name in reversed(images)} | {name: name for name in images}
    found: dict[str, list[str]] = {name: [] for name in images}
    for name in names:
        like = (name, re.sub(r"_\d\d(?=\.\w+\.xmp$)", "", name))
        parts = (text[: dot.start()] for text in like for dot in reversed([*re.finditer(r"\.", text)]))
        owner = next((owners[part] for part in parts if part in owners), None)
        if owner and name not in found and name.lower().endswith(COMPANIONS):
            found[owner].append(name)
    return found


def is_archive(path: str | os.PathLike) -> bool:
    """Whether this is the user's own archive of images."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES) and Path(path).is_file()


def check_output(file: Path, overwrite: bool, option: str = "--output") -> None:
    """ZooError for an output file that cannot be written, or exists, unless `overwrite` and no image or archive."""
    advice = f"choose another {option}"
    if os.path.lexists(file):
        with writing_to(file, advice), suppress(FileNotFoundError):  # a link to nothing
            check_regular(file)
        valued = *IMAGE_SUFFIXES, *RAW_SUFFIXES, *VIDEO_SUFFIXES, *ARCHIVE_SUFFIXES
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
    """Warn of files that are not read, if there are any, but not of the sidecars of photo managers."""
    if kinds := kinds - Counter({".xmp": kinds[".xmp"]}):
        raw = " RAW files are read after pip install 'dcp_zoo[photos]'." * (not kinds.keys().isdisjoint(RAW_SUFFIXES))
        warn(f"Ignored in {folder}: {counted(kinds)}.{raw}")
