"""Shards in the layout of the `webdataset` library, local or at URLs: wds://PATH. Images are read by their places."""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcp_zoo.data.paths import IMAGE_SUFFIXES, filesystem, is_image, is_url, list_files, open_file
from dcp_zoo.data.progress import bar
from dcp_zoo.data.specs import SHARD_SCHEME, DatasetSpec
from dcp_zoo.data.splits import PART_NAMES, Item, Split
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra
from dcp_zoo.fields import Values

CLASSNAMES_FILE = "classnames.txt"
_PATTERN = re.compile("[*{]")


def read_shards(spec: DatasetSpec, root: Path) -> Split:
    """Samples with an image and a `.cls`: its class name, or its line number in `classnames.txt`. `wds://PATH` is a
    folder or a pattern such as `{train,test}-*.tar`, relative to the data root; shards are named by their part."""
    place, shards = find_shards(spec.name, root)
    fixed = _PATTERN.split(place)[0]
    base = place if fixed == place and not place.endswith(".tar") else fixed.rpartition("/")[0]
    names = {shard: shard.removeprefix(f"{base}/") for shard in shards}
    parts = _parts_of(names)
    samples = {shard: list(_samples(shard, names[shard])) for shard in bar(shards, "Reading shards")}
    classes = _classes(base, {label for found in samples.values() for _, _, label in found})
    numbers = {name: number for number, name in enumerate(classes)}
    items: Values = {}
    for shard, found in samples.items():
        for path, key, label in found:
            number = numbers.get(label, int(label) if label.isdecimal() else -1)
            if not 0 <= number < len(classes):
                file = f"{base}/{CLASSNAMES_FILE}"
                raise ZooError(f"{spec.name}: the sample {key} has the label {label!r}, which is not in {file}.")
            items.setdefault(parts[shard], []).append(Item(path, key, number))
    return Split(spec.name, classes, **items, note=f"Read from {len(shards)} shards.", place=spec.name)


def shard_images(name: str) -> Iterator[tuple[str, str]]:
    """(name, path for `load_image`) of every image in the shards `wds://PATH`, which need no labels."""
    for shard in bar(find_shards(name)[1], "Reading shards"):
        with _opened_shard(shard) as tar:
            for member in tar:
                if member.isreg() and is_image(member.name.rpartition("/")[2]):
                    yield f"{shard}/{member.name}", _place_in(shard, member)


def read_member(path: str) -> bytes:
    """The image file for an item's path, `wds://SHARD#OFFSET+SIZE`."""
    shard, _, place = path.removeprefix(SHARD_SCHEME).rpartition("#")
    offset, _, size = place.partition("+")
    system, file = filesystem(shard)
    return system.cat_file(file, int(offset), int(offset) + int(size))


def find_shards(name: str, root: Path = Path()) -> tuple[str, list[str]]:
    """PATH of `wds://PATH`, absolute or a URL, and its shards; ZooError without any."""
    place = name.removeprefix(SHARD_SCHEME)
    if not is_url(place):
        place = (root / Path(place).expanduser()).absolute().as_posix()
    patterns = import_extra("webdataset", "data").shardlists.expand_urls(place)
    found = sorted({file for pattern in patterns for file in list_files(pattern)})
    shards = [file for file in found if file.endswith(".tar")]
    others = [Path(file).name for file in found if _PATTERN.search(place) and file not in shards]
    if others or not shards:
        problem = f"{', '.join(others[:3])} is not a .tar file" if others else f"no .tar file at {place}"
        raise ZooError(f"{name}: {problem}. Use wds://FOLDER or wds://'PATTERN-{{000..009}}.tar', not compressed.")
    return place, shards


def _parts_of(names: dict[str, str]) -> dict[str, str]:
    """The part in the name of each shard, which is a path under the folder of all; train for all if none is named."""
    named = {}
    for shard, name in names.items():
        words = re.split("[^a-z]+", name.removesuffix(".tar").lower())
        named[shard] = {PART_NAMES[word] for word in words if word in PART_NAMES}
    if not any(named.values()):
        return dict.fromkeys(names, "train")
    for shard, parts in named.items():
        if len(parts) != 1:
            found = " and ".join(sorted(parts)) or "no part"
            raise ZooError(f"The path of {shard} names {found}: it must contain one of train, val and test.")
    return {shard: parts.pop() for shard, parts in named.items()}


def _samples(shard: str, name: str) -> Iterator[tuple[str, str, str]]:
    """(path for `load_image`, key, label in `.cls`) of a shard's samples; of the images only headers are read."""
    group_by_keys = import_extra("webdataset", "data").tariterators.group_by_keys
    suffixes = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
    with _opened_shard(shard) as tar:
        files = ({"fname": m.name, "data": m, "__url__": shard} for m in tar if m.isreg())
        for sample in group_by_keys(files):
            images = [member for end, member in sample.items() if end.rpartition(".")[2] in suffixes]
            label = sample.get("cls")
            if label is None and not images:
                continue  # files that do not belong to a sample
            if label is None or len(images) != 1:
                found = f"{len(images)} images and {'a' if label else 'no'} .cls, instead of one of each"
                raise ValueError(f"the sample {sample['__key__']} has {found}")
            text = tar.extractfile(label).read().decode().strip()
            yield _place_in(shard, images[0]), f"{name}/{sample['__key__']}", text


def _classes(base: str, labels: set[str]) -> list[str]:
    """Class names: the lines of classnames.txt, or the labels themselves if they are names."""
    file = f"{base}/{CLASSNAMES_FILE}"
    try:
        with open_file(file) as opened:
            return opened.read().decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        if any(label.isdecimal() for label in labels):
            problem = f"The labels in {base} are numbers: create {file}"
            raise ZooError(f"{problem} with one class name per line, class 0 first.") from None
    return sorted(labels)


@contextmanager
def _opened_shard(shard: str) -> Iterator[Any]:
    """The archive; ZooError for what cannot be read, or ValueErrors inside the context."""
    message = f"Cannot read the shard {shard}: {{}}. Replace it, rewrite it with webdataset, or leave it out."
    with (
        as_zoo_error(message, tarfile.TarError, OSError, ValueError),
        open_file(shard) as file,
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        yield tar


def _place_in(shard: str, member: tarfile.TarInfo) -> str:
    return f"{SHARD_SCHEME}{shard}#{member.offset_data}+{member.size}"
