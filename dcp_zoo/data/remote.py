"""Files at URLs such as s3://BUCKET/KEY, gs:// or https://, through fsspec and its plugins."""

import re
from typing import IO, Any

from dcp_zoo.data.formats import is_visible
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.files import check_regular


def is_url(path: str) -> bool:
    """Whether a path is a URL. Ask for the zoo's own schemes (wds://, hf://, parquet://) first."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of a URL or a local path, and the path in it.

    Raises:
        ZooError: an unknown scheme, or one whose package is missing.
    """
    try:
        return import_extra("fsspec.core", "data").url_to_fs(path)
    except (ImportError, ValueError) as error:  # fsspec's messages name the package
        raise ZooError(f"Cannot open {path}: {error}.") from error


def open_file(path: str) -> IO[bytes]:
    """A file at a URL or a local path, for reading."""
    system, place = filesystem(path)
    if not is_url(path):
        check_regular(place)
    return system.open(place, "rb")


def list_files(url: str) -> list[str]:
    """All files at or below a URL or local path, or that match it (`*`, `**`), sorted, without hidden ones.

    Raises:
        ZooError: it cannot be listed.
    """
    system, place = filesystem(url)
    try:
        found = system.glob(place) if "*" in place else system.find(place)
    except Exception as error:  # every file system has exceptions of its own
        raise ZooError(f"Cannot list {url}: {error}.") from error
    given = place.partition("*")[0]
    visible = [file for file in found if all(map(is_visible, file.removeprefix(given).split("/")))]
    return sorted(map(system.unstrip_protocol, visible) if is_url(url) else visible)
