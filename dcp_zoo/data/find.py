"""Images to classify, without labels: files, folders, patterns and lists."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple

from dcp_zoo.data import paths
from dcp_zoo.errors import ZooError, as_zoo_error

LISTS = (".txt", ".lst")


class Found(NamedTuple):
    """One image: what results call it, and the path for `load_image`. For a file they are the same."""

    name: str
    path: str


def find_images(sources: Sequence[str]) -> list[Found]:
    """All images of the sources, in order. ZooError for a source without images.

    Args:
        sources: each an image file, a folder (with its subfolders, sorted by path), a pattern
            (`'photos/**/*.jpg'`), or a text file with one path per line (relative ones start at its folder).
    """
    return [Found(*image) for source in sources for image in _images_of(source)]


def _images_of(source: str) -> Iterator[tuple[str, str]]:
    """(name, path) of every image."""
    if "://" in source:
        raise ZooError(f"{source} is at a URL: download it, and pass the files.")
    elif source.lower().endswith(paths.VIDEO_SUFFIXES):
        raise ZooError(f"{source} is a video. Take pictures from it: ffmpeg -i {source} -vf fps=1 frames/%05d.jpg")
    elif source.lower().endswith(paths.ARCHIVE_SUFFIXES):
        raise ZooError(f"{source} is an archive: unpack it, and pass the folder.")
    elif os.path.isdir(source):  # noqa: PTH112  Path would change the names: ./a.jpg
        yield from ((path, path) for path in _in_folder(source))
    elif source.lower().endswith(LISTS) and Path(source).is_file():
        yield from ((path, path) for path in _in_list(Path(source)))
    elif has_magic(source) and not Path(source).exists():
        matching = sorted(path for path in glob(source, recursive=True) if "__MACOSX" not in path)  # noqa: PTH207
        images = [path for path in matching if paths.is_image(os.path.basename(path))]  # noqa: PTH119
        if not images:
            raise ZooError(f"No image matches {source} ({paths.KNOWN}).")
        yield from ((path, path) for path in images)
    elif paths.is_image(os.path.basename(source)) or os.path.lexists(source):  # noqa: PTH119
        yield source, source  # a missing one among many is an error in its row
    else:
        raise ZooError(f"There is no file or folder {source}: check the path.")


def _in_folder(folder: str) -> Iterator[str]:
    """Images in a folder and its subfolders, without what is hidden or belongs to the system."""
    others: Counter[str] = Counter()
    count = 0
    for path in paths.visible_files(folder):
        if paths.is_image(os.path.basename(path)):  # noqa: PTH119
            count += 1
            yield path
        else:
            others[paths.kind_of(path)] += 1
    if not count:
        instead = f", but {paths.counted(others)}" if others else ": it is empty"
        raise ZooError(f"No image in {folder} ({paths.KNOWN}){instead}.")
    paths.warn_of_skipped(folder, others)


def _in_list(file: Path) -> Iterator[str]:
    with as_zoo_error(f"Cannot read the list {file}: {{}}.", OSError):
        lines = file.read_text("utf-8-sig", "surrogateescape").split("\n")
    listed = [line.strip() for line in lines if line.strip()]
    if not listed:
        raise ZooError(f"The list {file} is empty: write one image path per line.")
    yield from (str(file.parent / path) for path in listed)
