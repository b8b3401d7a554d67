"""Images to classify, without labels: files, folders, zip and tar archives, patterns and lists."""

import atexit
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple

from dcp_zoo.errors import ZooError, as_zoo_error, shorten, warn

IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .bmp .gif .ppm .pgm .tif .tiff .webp .avif .heic .heif".split())
KNOWN = ", ".join(IMAGE_SUFFIXES)
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".m4v", ".mpg", ".mpeg", ".webm", ".wmv", ".3gp")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
LISTS = (".txt", ".lst")
_archives: dict[Path, Path] = {}  # folders, which are removed when the process ends, and what was unpacked into them


class Found(NamedTuple):
    """One image: what results call it, and the path for `load_image`. For a file they are the same."""

    name: str
    path: str


def find_images(sources: Sequence[str]) -> list[Found]:
    """All images of the sources, in order. ZooError for a source without images.

    Args:
        sources: each an image file, a folder (with its subfolders, sorted by path) or a zip or tar of it, a pattern
            (`'photos/**/*.jpg'`), or a text file with one path per line (relative ones start at its folder).
    """
    return [Found(*image) for source in sources for image in _images_of(source)]


def _images_of(source: str) -> Iterator[tuple[str, str]]:
    """(name, path) of every image."""
    if "://" in source:
        raise ZooError(f"{source} is at a URL: download it, and pass the files.")
    elif source.lower().endswith(VIDEO_SUFFIXES):
        raise ZooError(f"{source} is a video. Take pictures from it: ffmpeg -i {source} -vf fps=1 frames/%05d.jpg")
    elif os.path.isdir(source):  # noqa: PTH112  Path would change the names: ./a.jpg
        yield from ((path, path) for path in _in_folder(source))
    elif is_archive(source):
        folder = str(unpacked(source))
        yield from ((source + path.removeprefix(folder), path) for path in _in_folder(folder))
    elif source.lower().endswith(LISTS) and Path(source).is_file():
        yield from ((path, path) for path in _in_list(Path(source)))
    elif has_magic(source) and not Path(source).exists():
        images = [path for path in sorted(glob(source, recursive=True)) if is_image(path)]  # noqa: PTH207
        if not images:
            raise ZooError(f"No image matches {source} ({KNOWN}).")
        yield from ((path, path) for path in images if "__MACOSX" not in path)
    elif is_image(source) or os.path.lexists(source):
        yield source, source  # a missing one among many is an error in its row
    else:
        raise ZooError(f"There is no file or folder {source}: check the path.")


def _in_folder(folder: str) -> list[str]:
    skipped = Counter[str]()
    images = list(images_in(folder, skipped))
    if not images:
        instead = f", but {_counted(skipped)}" if skipped else ": it is empty"
        raise ZooError(f"No image in {folder} ({KNOWN}){instead}.")
    warn_of_skipped(folder, skipped)
    return images


def _in_list(file: Path) -> Iterator[str]:
    with as_zoo_error(f"Cannot read the list {file}: {{}}.", OSError):
        lines = file.read_text("utf-8-sig", "surrogateescape").split("\n")
    listed = [line.strip() for line in lines if line.strip()]
    if not listed:
        raise ZooError(f"The list {file} is empty: write one image path per line.")
    yield from (str(file.parent / path) for path in listed)


def images_in(folder: str | Path, skipped: Counter[str]) -> Iterator[str]:
    """The user's own images in a folder and its subfolders, sorted within each; `skipped` counts other files by kind.
    ZooError if one cannot be listed. Links to folders, which may lead back here, are not followed: a warning."""

    def cannot_list(error: OSError) -> None:
        raise ZooError(f"Cannot list {error.filename}: {error.strerror}.") from error

    for place, folders, files in os.walk(str(folder), onerror=cannot_list):
        folders[:] = sorted(filter(is_visible, folders))
        for linked in filter(os.path.islink, (os.path.join(place, each) for each in folders)):  # noqa: PTH118
            warn(f"{linked} is a link to a folder, and is not read: pass it itself.")
        for file in sorted(filter(is_visible, files)):
            if is_image(file):
                yield os.path.join(place, file)  # noqa: PTH118
            else:
                skipped[Path(file).suffix.lower() or file] += 1


def is_image(file: str) -> bool:
    """Whether a file is an image, by its name."""
    return file.lower().endswith(IMAGE_SUFFIXES)


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's own: not hidden, nor added by macOS to archives or Windows to folders."""
    return not name.startswith(".") and name.lower() not in ("__macosx", "thumbs.db", "desktop.ini")


def _counted(kinds: Counter[str]) -> str:
    """Such as "3 .mov, 1 .txt"."""
    return shorten([f"{count:,} {kind}" for kind, count in kinds.most_common()])


def warn_of_skipped(folder: str | Path, kinds: Counter[str]) -> None:
    """Warn of files that are not read, if there are any."""
    if kinds:
        warn(f"Ignored in {folder}: {_counted(kinds)}.")


def is_archive(path: str | os.PathLike) -> bool:
    """Whether this is an archive of images."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES) and Path(path).is_file()


@cache
def unpacked(file: str) -> Path:
    """What is in the user's own archive, or in its only folder, in a temporary folder; ZooError as of `extract`."""
    folder = Path(tempfile.mkdtemp(prefix="dcp_zoo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    extract(Path(file), folder, "is it a whole zip or tar file?")
    _archives[folder] = Path(file).absolute()
    inside = [path for path in folder.iterdir() if is_visible(path.name)]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def archive_of(path: Path) -> tuple[Path, str] | None:
    """The archive from which `unpacked` took a file, and the file's path in it; None for any other file."""
    folder = next(filter(_archives.get, path.parents), None)
    return None if folder is None else (_archives[folder], path.relative_to(folder).as_posix())


def extract(file: Path, folder: Path, advice: str) -> None:
    """Unpack a zip or tar archive, of which nothing leads out of the folder. ZooError, with advice, if it is damaged,
    encrypted, or neither of the two, has links or paths that lead out, or if the disk is full."""
    # the standard library raises almost any exception for archives that it cannot read
    with as_zoo_error(f"{file} cannot be unpacked ({{}}): {advice}", Exception):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as files:
                files.extractall(folder)  # which drops what would lead out
        elif tarfile.is_tarfile(file):  # otherwise the error would have a line for each kind of compression
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter="data")
        else:
            raise ValueError("neither a zip nor a tar file")
