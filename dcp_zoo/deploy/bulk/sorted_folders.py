"""Folders of sorted images: copies in a folder per class, which later runs move to where they belong then, or the
images themselves. What belongs to an image, see `companions`, goes where it goes."""

import filecmp
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

from dcp_zoo.data.find import Found
from dcp_zoo.data.paths import companions
from dcp_zoo.deploy.bulk.journal import Journal, remove_emptied
from dcp_zoo.errors import ZooError, warn, writing_to
from dcp_zoo.files import check_writable, unfinished, write_file

RECORD = ".copies.jsonl"  # in the folder: a line for each copy, by which later runs know it
ADVICE = "choose another --sort-into"
MTIME = 2  # seconds, the resolution of some file systems


def check_sortable(images: Sequence[Found], folder: Path) -> None:
    """Raise ZooError for a folder among the images, which would be found again."""
    target = os.path.abspath(folder) + os.sep  # noqa: PTH100  the links of Path.resolve are slow
    for image in images:
        if os.path.abspath(image.path).startswith(target):  # noqa: PTH100
            raise ZooError(f"--sort-into {folder} is where the images are ({image.name}): choose another folder.")


def sort_into(
    files: Sequence[str], folders: Iterable[str | None], place: Path, names: Sequence[str] = ()
) -> list[Path | None]:
    """Copy each image to `place/FOLDER/NAME`. If the name is taken, it gets a number: nothing is replaced. Images
    without a folder, and those that an earlier call has copied, are left out. Returns where each image is now.

    With `names`, by which a later call knows the images, a record is kept in `place`, and copies that it has are moved
    to where they belong now. What a person moved, changed or deleted there stays so; a warning counts it."""
    images = list(zip(map(Path, files), folders, names or [""] * len(files), strict=True))
    numbers: Counter[str] = Counter()  # of a name, so far
    targets, together = list[Path | None](), partial(_together, cache(companions))
    check_writable(place, ADVICE)
    with unfinished(place / ".copies") as temporary:
        with writing_to(place, ADVICE):
            own, left = _earlier(place, {name: source for source, folder, name in images if folder is not None})
        taken = {str(path).casefold() for path in own.values()}  # some file systems ignore the case
        for source, folder, name in images:
            targets.append(None)
            if folder is None or name in left:
                continue
            old = own.pop(name, None)
            target = unnumbered = place / folder / source.name
            key = str(unnumbered).casefold()
            with writing_to(unnumbered, ADVICE):
                unnumbered.parent.mkdir(parents=True, exist_ok=True)
                if old and old.parent == unnumbered.parent:
                    target = old
                else:
                    for number in count(numbers[key] + 1):
                        target = unnumbered.with_name(_numbered(source, number))
                        is_taken = any(map(os.path.lexists, together(source, target).values()))
                        free = not is_taken or (not old and _is_copy(source, target))
                        if free and str(target).casefold() not in taken:
                            break
                    numbers[key] = number
                    taken.add(str(target).casefold())
                if old and old != target:
                    for file, goal in reversed(together(old, target).items()):
                        if os.path.lexists(file) and not os.path.lexists(goal):
                            file.rename(goal)
                    remove_emptied(old.parent)
                for path, copy in together(source, target).items():
                    if not os.path.lexists(copy):
                        write_file(copy, partial(shutil.copy2, path), ADVICE, temporary)
                if name and target != old:
                    line = json.dumps([folder, target.name, name, source.stat().st_size, source.stat().st_mtime])
                    with (place / RECORD).open("a") as record:
                        record.write(f"\n{line}")  # a kill may have left half a line
                targets[-1] = target
    return targets


def move_into(
    files: Sequence[str], folders: Iterable[str | None], place: Path, journal: Journal, reserved: Container[str] = ()
) -> list[Path | None]:
    """Move each image to `place/FOLDER/NAME`, with a number if that or what belongs there is taken, or its whole path
    without its suffix is `reserved`; those without a folder stay. Returns where each image is that was moved."""
    targets, together = list[Path | None](), partial(_together, cache(companions))
    for source, folder in zip(map(Path, files), folders, strict=True):
        targets.append(None)
        if folder is None or not source.exists():  # it was given twice
            continue
        named = (place / folder / _numbered(source, number) for number in count(1))
        free = (path for path in named if os.path.abspath(path.with_suffix("")) not in reserved)  # noqa: PTH100
        targets[-1] = target = next(
            path for path in free if not any(map(os.path.lexists, together(source, path).values()))
        )
        with writing_to(target, ADVICE):
            for file, goal in reversed(together(source, target).items()):
                journal.move(file, goal)
    return targets


def _together(belonging: Callable[[Path], dict[str, list[str]]], source: Path, target: Path) -> dict[Path, Path]:
    """Where an image and what belongs to it go together: `a.jpg` with `a.xmp` to `a-2.jpg` and `a-2.xmp`."""
    others = belonging(source.parent).get(source.name, ())
    beside = {source.with_name(other): target.stem + other.removeprefix(source.stem) for other in others}
    return {source: target} | {file: target.with_name(name) for file, name in beside.items()}


def _earlier(place: Path, sources: Mapping[str, Path]) -> tuple[dict[str, Path], set[str]]:
    """Of images by their names, the copies that earlier calls made and nobody changed, and the names of those whose
    copy a person moved, changed or deleted. A warning counts these."""
    own, left = dict[str, Path](), set[str]()
    for folder, file, name, size, seconds in _record(place):
        stays = partial(_is_unchanged, size=size, seconds=seconds)
        if name in sources and stays(sources[name]):  # cameras give a name to another image later
            own[name] = place / folder / file  # the last line counts
            (left.discard if stays(own[name]) else left.add)(name)
    if left:
        what = "which you moved, changed or deleted: they are not copied again, unless you delete"
        warn(f"Images in {place} {what} {place / RECORD}: {len(left):,}.")
    return {name: path for name, path in own.items() if name not in left}, left


def replaced_since(place: Path, sources: Mapping[str, Path]) -> set[str]:
    """Of images by their names, those that are others than when an earlier `sort_into` copied them under this name."""
    differ = set[str]()
    for _, _, name, size, seconds in _record(place):
        if name in sources:
            (differ.discard if _is_unchanged(sources[name], size, seconds) else differ.add)(name)
    return differ


def _record(place: Path) -> Iterator[tuple[Any, ...]]:
    """What `sort_into` wrote of each copy: folder, file, the image's name, its size and its time."""
    for line in (place / RECORD).read_text().splitlines() if (place / RECORD).is_file() else ():
        with suppress(ValueError, TypeError):  # half a line, which a kill may leave
            folder, file, name, size, seconds = json.loads(line)
            if all(part and part == Path(part).name != ".." for part in (*folder.split("/"), file)):
                yield folder, file, name, int(size), float(seconds)


def _is_unchanged(file: Path, size: int, seconds: float) -> bool:
    return file.is_file() and file.stat().st_size == size and abs(file.stat().st_mtime - seconds) <= MTIME


def _is_copy(source: Path, target: Path) -> bool:
    return target.is_file() and not target.is_symlink() and filecmp.cmp(source, target, shallow=False)


def _numbered(file: Path, number: int) -> str:
    """The name of an image with a number, if that is not 1."""
    end = f"-{number}{file.suffix}" if number > 1 else file.suffix
    stem = file.stem
    while len(os.fsencode(stem + end)) > 255:  # on most file systems
        stem = stem[:-1]
    return stem + end
