"""Images to classify, without labels: files, folders, patterns, lists, shards, Parquet files and Hub datasets."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple

from dcp_zoo.data.formats import SUFFIXES, VIDEO_SUFFIXES, is_image, is_visible
from dcp_zoo.data.hub_datasets import hub_images
from dcp_zoo.data.parquet import is_parquet, parquet_images
from dcp_zoo.data.remote import is_url, list_files
from dcp_zoo.data.shards import shard_images
from dcp_zoo.data.splits import shorten
from dcp_zoo.data.table import HUB_SCHEME, SHARD_SCHEME
from dcp_zoo.errors import ZooError

LISTS = (".txt", ".lst")
FRAMES = "Take pictures from it first: ffmpeg -i {video} -vf fps=1 frames/%05d.jpg"


class Found(NamedTuple):
    """One image: what results call it, and the path for `load_image`. For a file they are the same."""

    name: str
    path: str


def find_images(sources: Sequence[str]) -> list[Found]:
    """All images of the sources, in order.

    Args:
        sources: each an image file, a folder (with its subfolders, sorted by path), a pattern (`'photos/**/*.jpg'`),
            a text file with one path per line (relative ones start at its folder), `wds://PATH`,
            `hf://datasets/ORG/NAME` or a Parquet file. Except for lists, they may be URLs that fsspec opens (s3://).

    Raises:
        ZooError: a source without images, or a video.
    """
    return [image for source in sources for image in _find(source)]


def _find(source: str) -> Iterator[Found]:
    if source.startswith(HUB_SCHEME):
        yield from (Found(path, path) for path in hub_images(source))
    elif source.startswith(SHARD_SCHEME):
        yield from (Found(*pair) for pair in shard_images(source))
    elif is_parquet(source) and "*" not in source:
        yield from (Found(*pair) for pair in parquet_images(source))
    elif source.lower().endswith(VIDEO_SUFFIXES):
        raise ZooError(f"{source} is a video. {FRAMES.format(video=source)}")
    elif is_url(source):
        yield from _at_url(source)
    elif os.path.isdir(source):  # noqa: PTH112  Path would change the names: ./a.jpg
        yield from _in_folder(source)
    elif source.lower().endswith(LISTS) and Path(source).is_file():
        yield from _in_list(Path(source))
    elif has_magic(source) and not Path(source).exists():
        yield from _matches(source)
    elif is_image(os.path.basename(source)) or os.path.lexists(source):  # noqa: PTH119
        yield Found(source, source)  # a missing one among many is an error in its row
    else:
        raise ZooError(f"There is no file or folder {source}: check the path.")


def _in_folder(folder: str) -> Iterator[Found]:
    """Images in a folder and its subfolders, without what is hidden or belongs to the system."""
    others: Counter[str] = Counter()
    count = 0
    for place, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = sorted(name for name in folders if is_visible(name))
        for file in sorted(filter(is_visible, files)):
            if is_image(file):
                count += 1
                yield Found(path := os.path.join(place, file), path)  # noqa: PTH118
            else:
                others[Path(file).suffix.lower() or file] += 1
    if not count:
        raise ZooError(f"No image in {folder} ({', '.join(SUFFIXES)}){_instead(others)}")


def _at_url(url: str) -> Iterator[Found]:
    """One image, or those below a folder or that match a pattern, with the Parquet files among them."""
    if "*" not in url and is_image(url.rpartition("/")[2]):
        yield Found(url, url)
        return
    found = [file for file in list_files(url) if is_image(file) or is_parquet(file)]
    if not found:
        raise ZooError(f"No image at {url} ({', '.join(SUFFIXES)}): check the URL.")
    for file in found:
        yield from _find(file)


def _cannot_list(error: OSError) -> None:
    raise ZooError(f"Cannot list {error.filename}: {error.strerror}.") from error


def _instead(others: Counter[str]) -> str:
    """The end of the message for a folder without images: what is in it instead, and what to do."""
    kinds = shorten([f"{count} {kind}" for kind, count in others.most_common()])
    advice = ""
    if any(kind in VIDEO_SUFFIXES for kind in others):
        advice = " " + FRAMES.format(video="VIDEO")
    elif ".tar" in others:
        advice = " Shards are read as wds://FOLDER."
    elif ".parquet" in others:
        advice = " Pass Parquet files themselves: FOLDER/*.parquet."
    return (f", but {kinds}." if kinds else ": it is empty.") + advice


def _in_list(file: Path) -> Iterator[Found]:
    try:
        lines = file.read_text("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        raise ZooError(f"Cannot read the list {file}: {error.strerror}.") from error
    paths = [line.strip() for line in lines if line.strip()]
    if not paths:
        raise ZooError(f"The list {file} is empty: write one image path per line.")
    for path in paths:
        path = path if "://" in path else str(file.parent / path)
        yield Found(path, path)


def _matches(pattern: str) -> Iterator[Found]:
    """The images and Parquet files that match."""
    paths = sorted(path for path in glob(pattern, recursive=True) if "__MACOSX" not in path)  # noqa: PTH207
    found = [path for path in paths if is_image(os.path.basename(path)) or is_parquet(path)]  # noqa: PTH119
    if not found:
        raise ZooError(f"No image matches {pattern} ({', '.join(SUFFIXES)}).")
    for path in found:
        yield from _find(path)
