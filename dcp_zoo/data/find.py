"""Images to classify, without labels: files, folders, patterns, lists, shards, Parquet files and Hub datasets."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dcp_zoo.data import paths
from dcp_zoo.data.archives import unpacked
from dcp_zoo.data.shards import shard_images
from dcp_zoo.data.specs import HUB_SCHEME, SHARD_SCHEME
from dcp_zoo.data.tables import hub_images, is_parquet, parquet_images
from dcp_zoo.data.videos import frames_of, is_video
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra

LISTS = (".txt", ".lst")


class Found(NamedTuple):
    """One image: what results call it, and the path for `load_image`. For a file they are the same."""

    name: str
    path: str


def find_images(sources: Sequence[str], fps: float | None = None) -> list[Found]:
    """All images of the sources, in order. ZooError for a source without images, or a video without `fps`.

    Args:
        sources: each an image file, a folder (with its subfolders, sorted by path) or a zip or tar of it, a pattern
            (`'photos/**/*.jpg'`), a text file with one path per line (relative ones start at its folder), `wds://PATH`,
            `hf://datasets/ORG/NAME` or a Parquet file. Except for lists, they may be URLs that fsspec opens (s3://). A
            RAW file and an image of the same name are one image.
        fps: also read videos, at this many frames per second: each frame is an image, followed by the whole video.
    """
    found = [Found(*image) for source in sources for image in _images_of(source, fps is not None)]
    photos = set(paths.one_per_photo(image.name for image in found))
    found = [image for image in found if image.name in photos]
    return found if fps is None else [image for each in found for image in _frames(each, fps)]


def _frames(image: Found, fps: float) -> Iterator[Found]:
    if is_video(image.path):
        frames = frames_of(image.path, fps)
        yield from (Found(f"{image.name}{frame.removeprefix(image.path)}", frame) for frame in frames)
        image = image._replace(path=f"{image.path}#t=")
    yield image


def _images_of(source: str, videos: bool = False) -> Iterator[tuple[str, str]]:
    """(name, path) of every image, and video if `videos`."""
    if source.startswith(HUB_SCHEME):
        yield from hub_images(source)
    elif source.startswith(SHARD_SCHEME):
        yield from shard_images(source)
    elif is_parquet(source) and "*" not in source:
        yield from parquet_images(source)
    elif is_video(source):
        if not videos or paths.is_url(source):
            raise ZooError(f"{source} is a video. Take pictures from it: ffmpeg -i {source} -vf fps=1 frames/%05d.jpg")
        import_extra("av", "video")
        yield source, source
    elif os.path.isdir(source):  # noqa: PTH112  Path would change the names: ./a.jpg
        yield from ((path, path) for path in _in_folder(source, videos))
    elif paths.is_archive(source):
        folder = str(unpacked(source))
        yield from ((source + path.removeprefix(folder), path) for path in _in_folder(folder, videos))
    elif source.lower().endswith(LISTS) and Path(source).is_file():
        yield from ((path, path) for path in _in_list(Path(source)))
    elif paths.is_url(source) and ("*" in source or not paths.is_image(source.rpartition("/")[2])):
        yield from _among(paths.list_files(source), f"No image at {source} ({paths.KNOWN}): check the URL.")
    elif not paths.is_url(source) and has_magic(source) and not Path(source).exists():
        matching = sorted(path for path in glob(source, recursive=True) if "__MACOSX" not in path)  # noqa: PTH207
        yield from _among(matching, f"No image matches {source} ({paths.KNOWN}).", videos)
    elif paths.is_image(source.rpartition("/")[2]) or os.path.lexists(source):
        yield source, source  # a missing one among many is an error in its row
    else:
        raise ZooError(f"There is no file or folder {source}: check the path.")


def _among(files: Sequence[str], otherwise: str, videos: bool = False) -> Iterator[tuple[str, str]]:
    """The images among files, and those in the Parquet files among them; ZooError `otherwise`."""
    found = [file for file in files if _is_image(file, videos) or is_parquet(file)]
    if not found:
        raise ZooError(otherwise)
    for file in found:
        yield from _images_of(file, videos)


def _is_image(path: str, videos: bool) -> bool:
    return paths.is_image(os.path.basename(path)) or (videos and is_video(path))  # noqa: PTH119


def _in_folder(folder: str, videos: bool) -> Iterator[str]:
    """Images in a folder and its subfolders, without what is hidden or belongs to the system."""
    others: Counter[str] = Counter()
    count = 0
    videos = videos and find_spec("av") is not None
    for path in paths.visible_files(folder):
        if _is_image(path, videos):
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
    yield from (path if "://" in path else str(file.parent / path) for path in listed)
