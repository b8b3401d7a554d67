"""Download one file: resumed where it stopped, and checked against the published checksum."""

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dcp_zoo.data.table import Archive
from dcp_zoo.errors import ZooError, cannot_write

CHUNK = 2**20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row without a new byte
PAUSE = 2.0  # seconds before the second attempt, doubled for each further one
AGENT = {"User-Agent": "dcp_zoo"}  # some servers refuse Python's own


Advance = Callable[[int, int | None], object]  # bytes on disk, bytes in total if known


def fetch(archive: Archive, folder: Path, advance: Advance = lambda done, total: None) -> Path:
    """The archive in `folder`, downloaded if it is not there yet; `advance` is called with each piece.

    Raises:
        ZooError: the source does not answer or has another file, the connection stays broken, or the disk is full.
            What arrived so far is kept and continued by the next call.
    """
    target = folder / archive.filename
    part = target.with_name(f"{target.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            _complete(archive, part, advance)
            _check(archive, part)
            part.rename(target)
        else:
            _check(archive, target)
    except OSError as error:
        raise cannot_write(folder, error, "run the same command again: it continues") from error
    return target


def size_of(archive: Archive) -> int | None:
    """The archive's size in bytes as its source states it; None if it does not answer."""
    try:
        request = urllib.request.Request(archive.url, headers=AGENT, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, http.client.HTTPException, TypeError, ValueError):
        return None


def _complete(archive: Archive, part: Path, advance: Advance) -> None:
    """Download until all bytes are there, again after a lost connection as long as that brings new bytes."""
    failures, problem = 0, ""
    while failures < ATTEMPTS:
        before = _size(part)
        try:
            if _continue(archive, part, advance):
                return
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            raise _refused(archive, part.parent, f"HTTP {error.code} {error.reason}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error))
        failures = 1 if _size(part) > before else failures + 1
        if failures < ATTEMPTS:
            time.sleep(PAUSE * 2 ** (failures - 1))
    if _size(part) == 0:
        raise _refused(archive, part.parent, problem)
    raise ZooError(
        f"The download of {archive.url} stopped after {_size(part):,} bytes ({problem}). They are kept: run the same "
        "command again to continue."
    )


def _continue(archive: Archive, part: Path, advance: Advance) -> bool:
    """Append what is missing; whether the file is complete."""
    done = _size(part)
    request = urllib.request.Request(archive.url, headers=AGENT | ({"Range": f"bytes={done}-"} if done else {}))
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing after the last byte: complete, or longer than the file now is
            return True
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise _refused(archive, part.parent, "it answers with a web page")
        done = done if answer.status == 206 else 0  # a server without ranges starts again
        length = answer.headers["Content-Length"]
        total = None if length is None else done + int(length)
        _check_space(part, total, done)
        with part.open("ab" if done else "wb") as file:
            while piece := answer.read1(CHUNK):
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


def _check(archive: Archive, file: Path) -> None:
    """Delete the file and raise ZooError unless it has the published checksum."""
    if not archive.md5:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as opened:
        while piece := opened.read(CHUNK):
            digest.update(piece)
    if digest.hexdigest() != archive.md5:
        file.unlink()
        raise ZooError(
            f"{file.name} has the md5 {digest.hexdigest()}, but {archive.md5} is published: it was damaged, or "
            f"{archive.url} has changed. It was deleted; run the same command again to download it once more."
        )


def _refused(archive: Archive, folder: Path, problem: str) -> ZooError:
    checked = f" It must have the md5 {archive.md5}." if archive.md5 else ""
    return ZooError(
        f"{archive.url} cannot be downloaded: {problem}. Get {archive.filename} with a browser or from a mirror, "
        f"put it in {folder}, and run the same command again.{checked}"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
