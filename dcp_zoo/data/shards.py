"""Local shards in the layout of the `webdataset` library: wds://PATH."""

import os
import re
import tarfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from dcp_zoo.data.formats import SUFFIXES, is_image
from dcp_zoo.data.remote import filesystem, is_url, list_files, open_file
from dcp_zoo.data.splits import PART_NAMES, Item, LabelledImages
from dcp_zoo.data.table import SHARD_SCHEME, DatasetSpec
from dcp_zoo.errors import ZooError, import_extra

NAMES = "classnames.txt"


class Sample(NamedTuple):
    """A sample of a shard: the location of its image in the file, and its label as written in `.cls`."""

    part: str
    path: str
    key: str
    label: str


def read_shards(spec: DatasetSpec, root: Path) -> LabelledImages:
    """Samples with an image and a `.cls`: its class name, or its line number in `classnames.txt` (one name per line).

    `wds://PATH` is a folder, searched for .tar files, or a pattern such as `shards/{train,test}-*.tar`; relative paths
    start at the data root, if there is one. The name of a shard, or of its folder under PATH, must contain its part:
    `train/0.tar`, `flowers-validation-000001.tar`. Images are read directly from the shards.
    """
    base, shards = _find(spec.name, root)
    parts = _parts_of(base, shards)
    samples: list[Sample] = []
    for shard in track(shards, "Reading shards", console=Console(stderr=True), transient=True):
        samples += _read(shard, shard.relative_to(base).as_posix(), parts[shard])
    classes = _classes(base, samples)
    numbers = {name: number for number, name in enumerate(classes)}
    items: dict[str, list[Item]] = {}
    for part, path, key, label in samples:
        number = numbers.get(label, int(label) if label.isdecimal() else -1)
        if not 0 <= number < len(classes):
            raise ZooError(f"{spec.name}: the sample {key} has the label {label!r}, which is not in {base / NAMES}.")
        items.setdefault(part, []).append(Item(path, key, number))
    return LabelledImages(spec.name, classes, items, spec.name, f"Read from {len(shards)} shards.")


def _find(name: str, root: Path) -> tuple[Path, list[Path]]:
    """The folder PATH, or the common folder of all matching shards; and the shards."""
    expand_urls = import_extra("webdataset", "data").shardlists.expand_urls
    place = (root / Path(name.removeprefix(SHARD_SCHEME)).expanduser()).absolute()
    if place.is_dir():
        found = sorted(place.rglob("*.tar"))
    else:
        found = sorted({Path(f) for pattern in expand_urls(str(place)) for f in glob(pattern)})  # noqa: PTH207 - absolute
    others = [path.name for path in found if path.suffix != ".tar"]
    if not found or others:
        problem = f"{', '.join(others[:3])} is not a .tar file" if others else f"no .tar file at {place}"
        raise ZooError(
            f"{name}: {problem}. Use wds://FOLDER or wds://'PATTERN-{{000..009}}.tar'. Download remote shards and "
            "unpack compressed ones (gunzip) first."
        )
    return place if place.is_dir() else Path(os.path.commonpath([path.parent for path in found])), found


def _parts_of(base: Path, shards: list[Path]) -> dict[Path, str]:
    """The part named in each shard's path under `base`; train for all shards if none is named."""
    named = {}
    for shard in shards:
        words = re.split("[^a-z]+", shard.relative_to(base).with_suffix("").as_posix().lower())
        named[shard] = {PART_NAMES[word] for word in words if word in PART_NAMES}
    if not any(named.values()):
        return dict.fromkeys(shards, "train")
    for shard, parts in named.items():
        if len(parts) != 1:
            found = " and ".join(sorted(parts)) or "no part"
            raise ZooError(
                f"The path of {shard} names {found}: it must contain exactly one of train, val and test, in its folder "
                "or file name."
            )
    return {shard: parts.pop() for shard, parts in named.items()}


def _read(shard: Path, name: str, part: str) -> Iterator[Sample]:
    """The samples of one shard, grouped by webdataset's rules; for images, only the archive's headers are read."""
    group_by_keys = import_extra("webdataset", "data").tariterators.group_by_keys
    suffixes = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
    problem = ""
    try:
        with tarfile.open(shard, "r:") as tar:
            files = ({"fname": m.name, "data": m, "__url__": str(shard)} for m in tar if m.isreg())
            for sample in group_by_keys(files):
                images = [member for end, member in sample.items() if end.rpartition(".")[2] in suffixes]
                label = sample.get("cls")
                if label is None and not images:
                    continue  # files that do not belong to a sample
                if label is None or len(images) != 1:
                    problem = (
                        f"the sample {sample['__key__']} has {len(images)} images and {'a' if label else 'no'} .cls, "
                        "instead of one of each"
                    )
                    break
                path = f"{SHARD_SCHEME}{shard}#{images[0].offset_data}+{images[0].size}"
                text = tar.extractfile(label).read().decode().strip()  # type: ignore[union-attr]  # None for links
                yield Sample(part, path, f"{name}/{sample['__key__']}", text)
    except (tarfile.TarError, OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise ZooError(f"Cannot read the shard {shard}: {problem}. Replace it, or rewrite it with webdataset.")


def _classes(base: Path, samples: list[Sample]) -> list[str]:
    """Class names: the lines of classnames.txt, or the labels themselves if they are names."""
    file = base / NAMES
    if file.is_file():
        return file.read_text("utf-8-sig").splitlines()
    labels = sorted({sample.label for sample in samples})
    if any(label.isdecimal() for label in labels):
        raise ZooError(f"The labels in {base} are numbers: create {file} with one class name per line, class 0 first.")
    return labels


def shard_files(name: str) -> list[str]:
    """The shards `wds://PATH`, which may be a URL; ZooError without any."""
    place = name.removeprefix(SHARD_SCHEME)
    if not is_url(place):
        return [str(shard) for shard in _find(name, Path())[1]]
    patterns = import_extra("webdataset", "data").shardlists.expand_urls(place)
    found = [file for pattern in patterns for file in list_files(pattern) if file.endswith(".tar")]
    if not found:
        raise ZooError(f"{name}: no .tar file there. Use wds://FOLDER or wds://'PATTERN-{{000..009}}.tar'.")
    return found


def shard_images(name: str) -> Iterator[tuple[str, str]]:
    """(name, path for `load_image`) of every image in the shards `wds://PATH`, which need no labels."""
    for shard in track(shard_files(name), "Reading shards", console=Console(stderr=True), transient=True):
        try:
            with open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isreg() and is_image(member.name.rpartition("/")[2]):
                        yield f"{shard}/{member.name}", f"{SHARD_SCHEME}{shard}#{member.offset_data}+{member.size}"
        except (tarfile.TarError, OSError) as error:
            raise ZooError(f"Cannot read the shard {shard}: {error}. Replace it, or leave it out.") from error


def read_member(path: str) -> bytes:
    """The image file for an item's path, `wds://SHARD#OFFSET+SIZE`."""
    shard, _, place = path.removeprefix(SHARD_SCHEME).rpartition("#")
    offset, _, size = place.partition("+")
    if is_url(shard):
        system, file = filesystem(shard)
        return system.cat_file(file, int(offset), int(offset) + int(size))
    with Path(shard).open("rb") as stream:
        stream.seek(int(offset))
        return stream.read(int(size))
