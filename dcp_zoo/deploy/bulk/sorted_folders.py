"""Folders of sorted images: copies or links in a folder per class, which later runs move to where they belong then, or
the images themselves. What belongs to an image, see `companions`, goes where it goes."""

import filecmp
import json
import os
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import count
from pathlib import Path

from dcp_zoo.data.find import Found
from dcp_zoo.data.paths import companions, is_image, one_per_photo, visible_files
from dcp_zoo.deploy.bulk.journal import Journal
from dcp_zoo.errors import ZooError, writing_to
from dcp_zoo.files import check_writable, unfinished, write_file

RECORD = ".copies.jsonl"  # in the folder: a line for each copy, written before it is made, so that later runs know it
MTIME = 2  # seconds, the resolution of some file systems


def is_file(image: Found) -> bool:
    """Whether an image is a file of its own, which can be copied."""
    return "://" not in image.path


def check_sortable(images: Sequence[Found], folder: Path) -> None:
    """Raise ZooError for images that are not files, and for a folder among the images, which would be found again."""
    if other := next((image.name for image in images if not is_file(image)), None):
        raise ZooError(f"Only files can be sorted into folders, not {other}: omit --sort-into.")
    target = os.path.abspath(folder) + os.sep  # noqa: PTH100  the links of Path.resolve are slow
    for image in images:
        if os.path.abspath(image.path).startswith(target):  # noqa: PTH100
            raise ZooError(f"--sort-into {folder} is where the images are ({image.name}): choose another folder.")


def sort_into(
    files: Sequence[str], folders: Iterable[str | None], place: Path, link: bool = False, names: Sequence[str] = ()
) -> list[Path | None]:
    """Copy each image to `place/FOLDER/NAME`, or make a symbolic link there. If the name is taken, it gets a number:
    nothing is replaced. Images without a folder, and those that an earlier call has copied, are left out. Returns where
    each image is now, if it is known.

    With `names`, by which a later call knows the images, a record is kept in `place`, and copies that it has are moved
    to where they belong now. What a person put, changed or moved there stays, and is counted in a warning."""
    advice = "omit --link" if link and os.name == "nt" else "choose another --sort-into"
    images = list(zip(map(Path, files), folders, names or [""] * len(files), strict=True))
    first: Counter[str] = Counter()  # numbers of a name that are all taken
    targets, belonging = list[Path | None](), cache(companions)
    check_writable(place, advice)
    with unfinished(place / ".copies") as temporary:
        with writing_to(place, advice):
            own, moved = _earlier(place, {name: source for source, folder, name in images if folder is not None})
        taken = {str(path).casefold() for path in own.values()}  # some file systems ignore the case
        for source, folder, name in images:
            targets.append(None)
            if folder is None or name in moved:
                continue
            others = belonging(source.parent).get(source.name, ())
            target = unnumbered = place / folder / source.name
            key, old = str(unnumbered).casefold(), own.pop(name, None)
            with writing_to(unnumbered, advice):
                unnumbered.parent.mkdir(parents=True, exist_ok=True)
                if old and old.parent == unnumbered.parent:
                    target = old
                else:
                    for number in count(first[key] + 1):
                        target = unnumbered.with_name(_numbered(source, number))
                        free = not _taken(target, source, others) or _is_same(source, target)
                        if free and str(target).casefold() not in taken:
                            break
                    taken.add(str(target).casefold())
                    first[key] += number == first[key] + 1
                if name and not (_is_same(source, target) if target == old else os.path.lexists(target)):
                    line = json.dumps([folder, target.name, name, source.stat().st_size, source.stat().st_mtime])
                    with (place / RECORD).open("a") as record:
                        record.write(f"\n{line}")  # a kill may have left half a line
                if old and old != target:
                    for other in belonging(old.parent).get(old.name, ()):
                        _rename(old.with_name(other), _beside(target, old, other))
                    old.unlink() if os.path.lexists(target) else old.rename(target)
                    with suppress(OSError):  # other files are there
                        old.parent.rmdir()
                if not link and not _is_copy(source, target):
                    target.unlink(missing_ok=True)  # a link of an earlier call, which would be written through
                beside = {source.with_name(other): _beside(target, source, other) for other in others}
                for path, copy in ({source: target} | beside).items():
                    if os.path.lexists(copy):  # perhaps a person changed it since
                        continue
                    if link:
                        copy.symlink_to(path.absolute())
                    else:
                        write_file(copy, partial(shutil.copy2, path), advice, temporary)
                targets[-1] = target
    return targets


def move_into(
    files: Sequence[str], folders: Iterable[str | None], place: Path, journal: Journal, reserved: Container[str] = ()
) -> list[Path | None]:
    """Move each image to `place/FOLDER/NAME`, with a number if that or what belongs there is taken, or the path without
    its suffix is `reserved`; those without a folder stay. Returns where each image is that was moved."""
    targets, belonging = list[Path | None](), cache(companions)
    for source, folder in zip(map(Path, files), folders, strict=True):
        targets.append(None)
        if folder is None or not source.exists():  # it was given twice
            continue
        others = belonging(source.parent).get(source.name, ())
        named = (place / folder / _numbered(source, number) for number in count(1))
        free = (path for path in named if str(path.with_suffix("")) not in reserved)
        targets[-1] = target = next(path for path in free if not _taken(path, source, others))
        with writing_to(target, "choose another --sort-into"):
            for other in others:
                journal.move(source.with_name(other), _beside(target, source, other))
            journal.move(source, target)
    return targets


def _beside(target: Path, source: Path, other: str) -> Path:
    """Where what belongs to an image goes with it: `a.xmp` of `a.jpg` to `a-2.xmp` for `a-2.jpg`."""
    return target.with_name(target.stem + other.removeprefix(source.stem))


def _taken(target: Path, source: Path, others: Iterable[str]) -> bool:
    """Whether one of the places for an image and what belongs to it is taken."""
    return any(map(os.path.lexists, [target, *(_beside(target, source, other) for other in others)]))


def _rename(old: Path, new: Path) -> None:
    if os.path.lexists(old) and not os.path.lexists(new):
        old.rename(new)


def _earlier(place: Path, sources: Mapping[str, Path]) -> tuple[dict[str, Path], set[str]]:
    """Of images by their names, the copies that earlier calls made and nobody changed, and the names of those whose
    copy a person moved. A warning counts the other images in the folder, if there were earlier calls."""
    recorded: dict[Path, tuple[str, int, float]] = {}  # of a path the last line counts
    for line in (place / RECORD).read_text().splitlines() if sources and (place / RECORD).is_file() else ():
        with suppress(ValueError, TypeError):  # half a line, which a kill may leave
            folder, file, name, size, seconds = json.loads(line)
            if all(part and part == Path(part).name != ".." for part in (folder, file)):  # it leads out of no folder
                recorded[place / folder / file] = str(name), int(size), float(seconds)
    own, lost = dict[str, Path](), dict[str, int]()
    for path, (name, size, seconds) in recorded.items():
        if source := sources.get(name):
            is_copy = path.is_file() and not path.is_symlink() and path.stat().st_size == size
            if _is_link(source, path) or (is_copy and abs(path.stat().st_mtime - seconds) <= MTIME):
                own[name] = path
            else:
                lost[name] = size
    if not own and not lost:
        return {}, set()
    others, known = defaultdict[int, list[Path]](list), {*own.values()}  # by size
    for path in map(Path, one_per_photo(visible_files(place))):
        if is_image(path.name) and path not in known and path.exists():
            others[path.stat().st_size].append(path)
    lost = {name: size for name, size in lost.items() if name not in own}
    moved = {name for name, size in lost.items() if any(_is_same(sources[name], path) for path in others[size])}
    if number := sum(map(len, others.values())):
        again = f" Not copied again, as they were moved there: {len(moved):,}." if moved else ""
        what = "not copies of these images, or were moved or changed by hand"
        warnings.warn(f"Images in {place} that are {what}: {number:,}. They stay there.{again}", stacklevel=3)
    return own, moved


def _is_copy(source: Path, target: Path) -> bool:
    return target.is_file() and not target.is_symlink() and filecmp.cmp(source, target)


def _is_link(source: Path, target: Path) -> bool:
    return target.is_symlink() and target.readlink() == source.absolute()


def _is_same(source: Path, target: Path) -> bool:
    return _is_copy(source, target) or _is_link(source, target)


def _numbered(file: Path, number: int) -> str:
    """The name of an image with a number, if that is not 1."""
    end = f"-{number}{file.suffix}" if number > 1 else file.suffix
    stem = file.stem
    while len(os.fsencode(stem + end)) > 255:  # on most file systems
        stem = stem[:-1]
    return stem + end
