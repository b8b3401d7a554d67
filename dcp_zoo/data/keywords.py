"""Keywords of photographs, as photo managers keep them: in the XMP of an image or of a sidecar, read and written by
Exiv2, the library of darktable and digiKam. (ExifTool 13.25 makes broken XML of a darktable sidecar in which an empty
attribute follows one that ends with "=".)"""

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dcp_zoo.data.paths import companions, is_image, is_raw, one_per_photo, visible_files
from dcp_zoo.data.specs import DatasetSpec
from dcp_zoo.data.splits import Item, Split, by_label, labels_of
from dcp_zoo.errors import ZooError, import_extra, nearest_hint, shorten
from dcp_zoo.files import read_plain
from dcp_zoo.texts import split_list

SUBJECT, IPTC = "Xmp.dc.subject", "Iptc.Application2.Keywords"
TREES = {"Xmp.lr.hierarchicalSubject": "|", "Xmp.digiKam.TagsList": "/"}  # and what stands between their levels
NAMESPACE, OWN = "https://github.com/dcp-zoo/dcp_zoo/", "Xmp.dcp_zoo.keywords"  # the record of what was written here


@cache
def _exiv2() -> Any:
    exiv2 = import_extra("exiv2", "photos")
    exiv2.LogMsg.setLevel(exiv2.LogMsg.Level.mute)
    exiv2.XmpProperties.registerNs(NAMESPACE, OWN.split(".")[1])
    return exiv2


def _opened(file: Path) -> Any:
    """Its metadata; ZooError if that cannot be read."""
    exiv2 = _exiv2()
    try:
        image = exiv2.ImageFactory.open(read_plain(file))
        image.readMetadata()
    except (exiv2.Exiv2Error, OSError) as error:
        raise ZooError(f"Cannot read the keywords of {file}: {error}. Replace the file, or move it away.") from error
    if image.imageType() == exiv2.ImageType.xmp:  # what Exiv2 made of the XMP, and would write back into it
        image.clearExifData()
        image.clearIptcData()
    return image


def _lists(image: Any) -> tuple[dict[str, list[str]], list[str]]:
    """The keywords by property, and those that `with_keywords` wrote."""
    xmp = image.xmpData()
    found = {key: _list(xmp, key) for key in (SUBJECT, *TREES)}
    found[SUBJECT] = found[SUBJECT] or [entry.toString() for entry in image.iptcData() if entry.key() == IPTC]
    return found, _list(xmp, OWN)


def _of_people(file: Path) -> dict[str, list[str]]:
    """The keywords in a file that `with_keywords` did not write; none in an image that cannot be read."""
    try:
        lists, written = _lists(_opened(file))
    except ZooError:
        if file.suffix.lower() == ".xmp":
            raise
        return {key: [] for key in (SUBJECT, *TREES)}
    return {key: [entry for entry in entries if entry not in written] for key, entries in lists.items()}


def _leaves(lists: dict[str, list[str]]) -> set[str]:
    """The keywords in these lists; of hierarchical ones the last level."""
    trees = (entry.rpartition(mark)[2] for key, mark in TREES.items() for entry in lists[key])
    return {*lists[SUBJECT], *trees}


def _list(xmp: Any, key: str) -> list[str]:
    return [str(entry) for entry in xmp[key].getValue()] if key in xmp else []


def keyword_files(image: Path, others: Sequence[str], embed: bool = False) -> list[Path]:
    """The files that hold the keywords of an image: the JPEG itself if `embed`, and its sidecars among `others`, the
    names of what belongs to it. If it has none, the one in which photo managers will look: Lightroom in `a.xmp` for a
    RAW file, darktable and digiKam in `a.jpg.xmp`."""
    beside = [image.with_name(name) for name in others if name.lower().endswith(".xmp")]
    has_raw = any(map(is_raw, [image.name, *others]))
    inside = [image] if embed and image.suffix.lower() in (".jpg", ".jpeg") else []
    if beside or (inside and not has_raw):
        return [*inside, *beside]
    return [*inside, image.with_suffix(".xmp") if has_raw else image.with_name(f"{image.name}.xmp")]


def labelled_by_keywords(spec: DatasetSpec, folder: Path, labels: Path) -> Split:
    """The images in a folder that have one of the keywords in `labels`, such as `xmp:cat,tea cup`, as class; those that
    have several are left out. Keywords that `with_keywords` wrote do not count, and of hierarchical ones the last level
    does. ZooError, which lists the keywords, for none of them in `labels`, or one that no image has."""
    files = one_per_photo(file for file in visible_files(folder) if is_image(Path(file).name))
    belonging = cache(companions)
    keywords = dict[str, set[str]]()
    for file in map(Path, files):
        holding = {file, *filter(Path.exists, keyword_files(file, belonging(file.parent).get(file.name, ())))}
        keywords[str(file)] = set[str]().union(*(_leaves(_of_people(each)) for each in holding))
    counts = Counter(name for of_image in keywords.values() for name in of_image)
    names = [name for name in split_list(str(labels)[4:]) if name]
    if not names:
        most = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        found = shorten([f"{name} ({count:,})" for name, count in most], 20) or "none"
        raise ZooError(f"Say which keywords are classes: --labels xmp:cat,dog. Those in {folder}: {found}.")
    if missing := [name for name in names if name not in counts]:
        raise ZooError(f"No image in {folder} has the keyword {missing[0]!r}.{nearest_hint(missing[0], counts)}")
    chosen = {file: of_image.intersection(names) for file, of_image in keywords.items()}
    *classes, _ = numbers = labels_of(set().union(*(found for found in chosen.values() if len(found) == 1)))
    items = [
        Item(file, os.path.relpath(file, folder).replace(os.sep, "/"), numbers[next(iter(found))])
        for file, found in chosen.items()
        if len(found) == 1
    ]
    several = sum(len(found) > 1 for found in chosen.values())
    note = f"Left out: {several:,} images with several of these keywords." if several else ""
    return Split(spec.name, classes, **by_label(items), note=note, place=str(folder))


def with_keywords(file: Path, path: Sequence[str], image: Path) -> bytes | None:
    """The content of an image or its sidecar with a class as keyword, or None if nothing changes. Keywords of earlier
    calls are replaced; others stay, and so does the absence of one that was written and is there no more. A sidecar in
    which nothing is left is empty. ZooError if the file cannot be read.

    Args:
        file: the image itself, or its sidecar, which may be missing.
        path: the names of the nodes from the top of a hierarchy to the class, or the class alone, or nothing.
    """
    exiv2 = _exiv2()
    opened = _opened(file) if file.exists() else exiv2.ImageFactory.create(exiv2.ImageType.xmp)
    before, written = _lists(opened)
    refused = set(written).difference(*before.values())  # a person removed them
    others = {key: [entry for entry in entries if entry not in written] for key, entries in before.items()}
    if not any(before.values()) and not written:
        others = _of_people(image)  # which those in a sidecar would hide
    levels = [entry.split(mark) for key, mark in TREES.items() for entry in others[key]]
    new = {key: [mark.join(name.replace(mark, "_") for name in path)] for key, mark in TREES.items()}
    new = {SUBJECT: list(path)} | new if path and path[-1] not in _leaves(others) else {}
    if not new and not written:
        return None
    after = {OWN: sorted(refused)}
    for key, entries in others.items():
        if key in TREES and new and not entries:  # a reader that finds a list of hierarchical keywords reads no other
            entries = [TREES[key].join(names) for names in levels] or others[SUBJECT]
        added = [entry for entry in new.get(key, ()) if entry not in (*entries, *refused)]
        after[OWN] += [entry for entry in added if entry not in after[OWN]]
        after[key] = [*entries, *added]
    if after == before | {OWN: written}:
        return None
    for key, entries in after.items():
        _set(opened.xmpData(), key, entries)
    if opened.imageType() == exiv2.ImageType.xmp and opened.xmpData().empty():  # Exiv2 would write what was there
        return b""
    opened.writeMetadata()
    content = opened.io()
    content.open()
    return bytes(content.mmap())


def _set(xmp: Any, key: str, entries: list[str]) -> None:
    exiv2 = _exiv2()
    if entries:
        kind = exiv2.TypeId.xmpSeq if key == "Xmp.digiKam.TagsList" else exiv2.TypeId.xmpBag
        xmp[key] = exiv2.XmpArrayValue(entries, kind)
    elif key in xmp:
        del xmp[key]
