"""Unpack an archive into a dataset's folder, and nowhere else."""

import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from dcp_zoo.data.table import Archive
from dcp_zoo.errors import ZooError, cannot_write

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, KeyError)
Member = tuple[str, Callable[[], IO[bytes] | None]]  # its path in the archive, and a function that opens it


def unpack(archive: Archive, file: Path, folder: Path) -> None:
    """Put the archive's `places` under `folder`. Files appear there only when all have been unpacked.

    Raises:
        ZooError: the file is damaged or no archive, lacks one of the places, holds links or paths that lead out of it,
            or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.places:
            shutil.copy(file, folder / archive.filename)
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
            found = _extract(archive, file, Path(temporary))
            for place in archive.places.keys() - found:
                raise ZooError(f"{file} has no folder {place}: it is not the archive that {archive.url} offered.")
            _move(Path(temporary), folder)
    except DAMAGED as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ZooError(
            f"{file} cannot be unpacked ({reason}): it is damaged or no archive. Delete it, and run the same command "
            "again to download it once more."
        ) from error
    except OSError as error:
        raise cannot_write(folder, error, "run the same command again") from error


def _extract(archive: Archive, file: Path, target: Path) -> set[str]:
    """Write the files of all places under `target`; the places that had any."""
    found = set()
    with _members(file, archive.inner) as members:
        for name, open_member in members:
            for place, destination in archive.places.items():
                if name.startswith(f"{place}/"):
                    path = target / destination / _checked(name, file)[len(place) + 1 :]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    content = open_member()
                    if content is None:
                        raise ZooError(
                            f"{file}: {name} is a link or a device, which no dataset needs. Nothing was kept."
                        )
                    with content, path.open("wb") as output:
                        shutil.copyfileobj(content, output, 2**20)
                    found.add(place)
    return found


def _checked(name: str, file: Path) -> str:
    """The name; ZooError if it leads out of the folder it is unpacked in."""
    path = PureWindowsPath(name)  # handles both separators, and drives
    if path.anchor or ".." in path.parts:
        raise ZooError(f"{file}: the path {name!r} leads out of the archive. Nothing was kept; do not trust this file.")
    return name


@contextmanager
def _members(file: Path, inner: str) -> Iterator[Iterator[Member]]:
    """The files of a zip or tar archive, or of the tar archive `inner` inside a zip."""
    if not zipfile.is_zipfile(file):
        with tarfile.open(file) as tar:
            yield _tar_members(tar)
        return
    with zipfile.ZipFile(file) as archive:
        if not inner:
            yield _zip_members(archive)
            return
        with archive.open(inner) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            yield _tar_members(tar)


def _tar_members(tar: tarfile.TarFile) -> Iterator[Member]:
    for member in tar:
        if not member.isdir() and _is_wanted(member.name):
            yield member.name.removeprefix("./"), _opener(tar, member)


def _opener(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], Any]:
    return lambda: tar.extractfile(member) if member.isfile() else None


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        if not info.is_dir() and _is_wanted(info.filename):
            yield info.filename, lambda info=info: archive.open(info)  # type: ignore[misc]


def _is_wanted(name: str) -> bool:
    """Whether it is not one of the files that macOS adds."""
    return not PurePosixPath(name).name.startswith("._") and not name.startswith("__MACOSX/")


def _move(source: Path, target: Path) -> None:
    """Move all files to the same place under `target`, replacing those that are there."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            path.replace(place)
