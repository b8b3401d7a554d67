"""One archive of a dataset: downloaded, resumed where it stopped, checked, and unpacked into its folder."""

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from dcp_zoo.data.table import Archive
from dcp_zoo.errors import ZooError, cannot_write

PIECE = 2**20  # bytes
SILENCE = 30.0  # seconds without a byte, after which a connection is broken
TRIES = 5  # in a row without a new byte
PAUSE = 2.0  # seconds before the second try, doubled for each further one
AGENT = {"User-Agent": "dcp_zoo"}  # some servers refuse Python's own
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, KeyError)

Advance = Callable[[int, int | None], object]  # bytes on disk, bytes in total if known


def fetch_archive(archive: Archive, folder: Path, advance: Advance = lambda done, total: None) -> Path:
    """The archive in `folder`, downloaded if it is not there yet; `advance` is called with each piece.

    Raises:
        ZooError: the source does not answer or has another file, the connection stays broken, or the disk is full.
            What arrived so far is kept and continued by the next call.
    """
    target = folder / archive.filename
    part = target.with_name(f"{target.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = target if target.exists() else _complete(archive, part, advance)
        _check_md5(archive, file)
        return file.rename(target)
    except OSError as error:
        raise cannot_write(folder, error, "run the same command again: it continues") from error


def size_of(archive: Archive) -> int | None:
    """The archive's size in bytes as its source states it; None if it does not answer."""
    try:
        request = urllib.request.Request(archive.url, headers=AGENT, method="HEAD")
        with urllib.request.urlopen(request, timeout=SILENCE) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, http.client.HTTPException, TypeError, ValueError):
        return None


def _complete(archive: Archive, part: Path, advance: Advance) -> Path:
    """`part`, once all its bytes are there; a lost connection is resumed as long as that brings new bytes."""
    failures, problem = 0, ""
    while failures < TRIES:
        before = _size(part)
        try:
            if _continue(archive, part, advance):
                return part
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            raise _cannot_download(archive, part.parent, f"HTTP {error.code} {error.reason}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error))
        failures = 1 if _size(part) > before else failures + 1
        if failures < TRIES:
            time.sleep(PAUSE * 2 ** (failures - 1))
    if _size(part) == 0:
        raise _cannot_download(archive, part.parent, problem)
    raise ZooError(
        f"The download of {archive.url} stopped after {_size(part):,} bytes ({problem}). They are kept: run the same "
        "command again to continue."
    )


def _continue(archive: Archive, part: Path, advance: Advance) -> bool:
    """Append what is missing; whether the file is complete."""
    done = _size(part)
    request = urllib.request.Request(archive.url, headers=AGENT | ({"Range": f"bytes={done}-"} if done else {}))
    try:
        answer = urllib.request.urlopen(request, timeout=SILENCE)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing after the last byte: complete, or longer than the file now is
            return True
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise _cannot_download(archive, part.parent, "it answers with a web page")
        done = done if answer.status == 206 else 0  # a server without ranges starts again
        length = answer.headers["Content-Length"]
        total = None if length is None else done + int(length)
        _check_space(part, total, done)
        with part.open("ab" if done else "wb") as file:
            while piece := answer.read1(PIECE):
                file.write(piece)
                done += len(piece)
                advance(done, total)
    return total is None or done >= total


def _check_space(part: Path, total: int | None, done: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - done > free:
        raise ZooError(
            f"{part.parent} has {free / 1e9:.1f} GB free, but {(total - done) / 1e9:.1f} GB of {part.stem} are "
            "missing: free disk space, or use another --data-root."
        )


def _check_md5(archive: Archive, file: Path) -> None:
    """Delete the file and raise ZooError unless it has the published checksum."""
    if not archive.md5:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
    if digest.hexdigest() != archive.md5:
        file.unlink()
        raise ZooError(
            f"{file.name} has the md5 {digest.hexdigest()}, but {archive.md5} is published: it was damaged, or "
            f"{archive.url} has changed. It was deleted; run the same command again to download it once more."
        )


def _cannot_download(archive: Archive, folder: Path, problem: str) -> ZooError:
    checked = f" It must have the md5 {archive.md5}." if archive.md5 else ""
    return ZooError(
        f"{archive.url} cannot be downloaded: {problem}. Get {archive.filename} with a browser or from a mirror, "
        f"put it in {folder}, and run the same command again.{checked}"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- unpacking -------------------------------------------------------------------------------------------------------


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
