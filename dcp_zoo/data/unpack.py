"""Unpack an archive into a dataset's folder, and nowhere else."""

import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from dcp_zoo.data.table import Archive
from dcp_zoo.errors import ZooError, cannot_write

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, KeyError)


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
            _extract(file, archive, Path(temporary))
            for place in archive.places:
                if not (Path(temporary) / place).is_dir():
                    raise ZooError(f"{file} has no folder {place}: it is not the archive that {archive.url} offered.")
            for place, destination in archive.places.items():
                _merge(Path(temporary) / place, folder / destination)
    except DAMAGED as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ZooError(
            f"{file} cannot be unpacked ({reason}): it is damaged or no archive. Delete it, and run the same command "
            "again to download it once more."
        ) from error
    except OSError as error:
        raise cannot_write(folder, error, "run the same command again") from error


def _extract(file: Path, archive: Archive, target: Path) -> None:
    """The places in a zip or tar archive, or in the tar archive `inner` inside a zip."""

    def is_needed(name: str) -> bool:
        """Whether it is in one of the places, and not one of the files that macOS adds."""
        inside = any(name.startswith(f"{place}/") for place in archive.places)
        return inside and not PurePosixPath(name).name.startswith("._")

    def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        if not is_needed(member.name.removeprefix("./")):
            return None
        _check_path(member.name, file)
        if not (member.isfile() or member.isdir()):
            raise ZooError(f"{file}: {member.name} is a link or a device, which no dataset needs. Nothing was kept.")
        return tarfile.data_filter(member, path)

    if not zipfile.is_zipfile(file):
        with tarfile.open(file) as tar:
            tar.extractall(target, filter=checked)
        return
    with zipfile.ZipFile(file) as opened:
        if archive.inner:
            with opened.open(archive.inner) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                tar.extractall(target, filter=checked)
            return
        names = list(filter(is_needed, opened.namelist()))
        for name in names:
            _check_path(name, file)
        opened.extractall(target, names)


def _check_path(name: str, file: Path) -> None:
    """ZooError for a path that leads out of the folder it is unpacked in."""
    path = PureWindowsPath(name)  # handles both separators, and drives
    if path.anchor or ".." in path.parts:
        raise ZooError(f"{file}: the path {name!r} leads out of the archive. Nothing was kept; do not trust this file.")


def _merge(source: Path, target: Path) -> None:
    """Move all files to the same place under `target`, replacing those that are there."""
    for path in sorted([source, *source.rglob("*")]):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            path.replace(place)
