"""Shards in the layout of the `webdataset` library, local or at URLs: wds://PATH. Images are read by their places."""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcp_zoo.data.paths import filesystem, is_image, is_url, list_files, open_file
from dcp_zoo.data.progress import bar
from dcp_zoo.data.specs import SHARD_SCHEME
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra

_PATTERN = re.compile("[*{]")


def shard_images(name: str) -> Iterator[tuple[str, str]]:
    """(name, path for `load_image`) of every image in the shards `wds://PATH`."""
    for shard in bar(find_shards(name), "Reading shards"):
        with _opened_shard(shard) as tar:
            for member in tar:
                if member.isreg() and is_image(member.name.rpartition("/")[2]):
                    yield f"{shard}/{member.name}", f"{SHARD_SCHEME}{shard}#{member.offset_data}+{member.size}"


def read_member(path: str) -> bytes:
    """The image file for an item's path, `wds://SHARD#OFFSET+SIZE`."""
    shard, _, place = path.removeprefix(SHARD_SCHEME).rpartition("#")
    offset, _, size = place.partition("+")
    system, file = filesystem(shard)
    return system.cat_file(file, int(offset), int(offset) + int(size))


def find_shards(name: str) -> list[str]:
    """The shards of `wds://PATH`, a folder or a pattern such as `0*.tar`, as paths or URLs; ZooError without any."""
    place = name.removeprefix(SHARD_SCHEME)
    if not is_url(place):
        place = Path(place).expanduser().absolute().as_posix()
    patterns = import_extra("webdataset", "data").shardlists.expand_urls(place)
    found = sorted({file for pattern in patterns for file in list_files(pattern)})
    shards = [file for file in found if file.endswith(".tar")]
    others = [Path(file).name for file in found if _PATTERN.search(place) and file not in shards]
    if others or not shards:
        problem = f"{', '.join(others[:3])} is not a .tar file" if others else f"no .tar file at {place}"
        raise ZooError(f"{name}: {problem}. Use wds://FOLDER or wds://'PATTERN-{{000..009}}.tar', not compressed.")
    return shards


@contextmanager
def _opened_shard(shard: str) -> Iterator[tarfile.TarFile]:
    """The archive; ZooError for what cannot be read."""
    message = f"Cannot read the shard {shard}: {{}}. Replace it, rewrite it with webdataset, or leave it out."
    with (
        as_zoo_error(message, tarfile.TarError, OSError),
        open_file(shard) as file,
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        yield tar
