"""Images to classify, without labels: files, folders, patterns and lists."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from dcp_zoo.errors import ZooError, as_zoo_error, shorten, warn
from dcp_zoo.files import IMAGE_SUFFIXES

KNOWN = ", ".join(IMAGE_SUFFIXES)


def find_images(sources: Sequence[str]) -> list[str]:
    """The paths of all images of the sources, in order. ZooError for a source without images.

    Args:
        sources: each an image file, a folder (with its subfolders, sorted by path), a pattern
            (`'photos/**/*.jpg'`), or a text file with one path per line (relative ones start at its
            folder).
    """
    return [path for source in sources for path in _images_of(source)]


def _images_of(source: str) -> list[str]:
    if os.path.isdir(source):  # noqa: PTH112  Path would change the names: ./a.jpg
        skipped = Counter[str]()
        images = list(images_in(source, skipped))
        warn_of_skipped(source, skipped)
    elif source.lower().endswith(".txt") and Path(source).is_file():
        images = _in_list(Path(source))
    elif has_magic(source) and not Path(source).exists():
        found = sorted(glob(source, recursive=True))  # noqa: PTH207
        images = [path for path in found if is_image(path) and "__MACOSX" not in path]
    elif is_image(source) or os.path.lexists(source):
        images = [source]  # a missing one among many is an error in its row
    else:
        raise ZooError(f"There is no file or folder {source}: check the path.")
    if not images:
        raise ZooError(f"There is no image in {source} ({KNOWN}).")
    return images


def _in_list(file: Path) -> list[str]:
    with as_zoo_error(f"Cannot read the list {file}: {{}}.", OSError):
        text = file.read_text("utf-8-sig", "surrogateescape")
    return [str(file.parent / line.strip()) for line in text.split("\n") if line.strip()]


def images_in(folder: str | Path, skipped: Counter[str]) -> Iterator[str]:
    """The user's own images in a folder and its subfolders, sorted within each. Links to folders, which
    may lead back here, are not followed: a warning. ZooError for a folder that cannot be listed.

    Args:
        folder: the folder.
        skipped: counts the other files by suffix; it is changed.
    """

    def cannot_list(error: OSError) -> None:
        raise ZooError(f"Cannot list {error.filename}: {error.strerror}.") from error

    for directory, folders, files in os.walk(str(folder), onerror=cannot_list):
        folders[:] = sorted(filter(is_visible, folders))  # os.walk goes on with these
        for name in folders:
            path = os.path.join(directory, name)  # noqa: PTH118
            if os.path.islink(path):  # noqa: PTH114
                warn(f"{path} is a link to a folder, and is not read: pass it itself.")
        for name in sorted(filter(is_visible, files)):
            if is_image(name):
                yield os.path.join(directory, name)  # noqa: PTH118
            else:
                skipped[Path(name).suffix.lower() or name] += 1


def is_image(file: str) -> bool:
    return file.lower().endswith(IMAGE_SUFFIXES)


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's own: not hidden, nor added by macOS to archives or Windows
    to folders."""
    return not name.startswith(".") and name.lower() not in ("__macosx", "thumbs.db", "desktop.ini")


def warn_of_skipped(folder: str | Path, kinds: Counter[str]) -> None:
    """Such as "3 .mov, 1 .txt"."""
    if kinds:
        warn(f"Ignored in {folder}: {shorten([f'{count:,} {kind}' for kind, count in kinds.most_common()])}.")
