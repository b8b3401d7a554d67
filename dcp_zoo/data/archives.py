"""One archive of a dataset: downloaded, resumed where it stopped, checked, and unpacked into its folder."""

import http.client
import lzma
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import ExitStack
from email.message import Message
from functools import cache
from pathlib import Path, PurePosixPath

from dcp_zoo.data.paths import is_visible
from dcp_zoo.data.progress import bar
from dcp_zoo.data.specs import Archive
from dcp_zoo.errors import ZooError, as_zoo_error, writing_to
from dcp_zoo.files import UNPACKED

SILENCE = 30.0  # seconds without a byte, after which a connection is broken
TRIES = 5  # in a row without a new byte
FIRST_PAUSE = 2.0  # seconds before the second try, doubled for each further one
AGENT = {"User-Agent": "dcp_zoo"}  # some servers refuse Python's own
CHANGED = "its responses are inconsistent: the file has changed, or the server is at fault"
# what the standard library raises for archives it cannot read, encrypted ones included
DAMAGED = (tarfile.TarError, zipfile.error, zlib.error, lzma.LZMAError, EOFError, KeyError, ValueError, RuntimeError)

# folders that are removed when the process ends, and the archives that were unpacked into them
_temporary: dict[Path, tuple[Path, ExitStack]] = {}


def fetch_archive(archive: Archive, folder: Path) -> Path:
    """The archive in `folder`, downloaded if it is not there yet; what arrived is continued by the next call. ZooError
    if the source does not answer or has another file, the connection stays broken, or the disk is full."""
    target = folder / archive.filename
    part = target.with_name(f"{target.name}.part")
    with writing_to(folder, "run the same command again: it continues"):
        folder.mkdir(parents=True, exist_ok=True)
        file = target if target.exists() else _complete(archive, part)
        _note(part).unlink(missing_ok=True)
        _check_md5(archive, file)
        return file.rename(target)


def _complete(archive: Archive, part: Path) -> Path:
    """`part`, once all its bytes are there; a lost connection is resumed as long as that brings new bytes."""
    failures = 0
    while True:
        before = _kept(archive, part)[0]
        try:
            _continue(archive, part)
            return part
        except urllib.error.HTTPError as error:
            raise _cannot_download(archive, part.parent, f"HTTP {error.code} {error.reason}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            failures = 1 if _kept(archive, part)[0] > before else failures + 1
            if failures == TRIES:
                raise _cannot_download(archive, part.parent, str(getattr(error, "reason", error))) from error
        time.sleep(FIRST_PAUSE * 2 ** (failures - 1))


def _continue(archive: Archive, part: Path) -> None:
    """Append what is missing; ConnectionError if some still is. Two versions of a file are never joined."""
    done, version = _kept(archive, part)
    wanted = ({"Range": f"bytes={done}-"} if done else {}) | ({"If-Range": version} if done and version else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(archive.url, headers=AGENT | wanted), timeout=SILENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:
            raise
        if error.headers["Content-Range"] == f"bytes */{done}" and _version_of(error.headers) in ("", version):
            return  # nothing is missing
        part.unlink()
        raise ConnectionError(CHANGED) from error
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise _cannot_download(archive, part.parent, "it answers with a web page")
        now, length = _version_of(answer.headers), answer.headers["Content-Length"]
        if answer.status == 206:
            rest = re.fullmatch(rf"bytes {done}-\d+/(\d+)", answer.headers["Content-Range"] or "")
            if not rest or now != version:
                part.unlink()
                raise ConnectionError(CHANGED)
            total: int | None = int(rest[1])
        elif length is not None and not length.isdecimal():
            raise _cannot_download(archive, part.parent, f"it states a length of {length!r} bytes")
        else:
            done, total = 0, None if length is None else int(length)
        _check_space(part, total, done)
        shown = bar(None, archive.filename, total, initial=done, unit="B", unit_scale=True)
        with part.open("ab" if done else "wb") as file, shown:
            if not done:
                _note(part).write_text(now)
            while piece := answer.read1(2**20):
                done += file.write(piece)
                shown.update(len(piece))
    if total is not None and done < total:
        raise ConnectionError("the connection ended early")
    if total is not None and done > total:
        part.unlink()
        raise ConnectionError(CHANGED)


def _version_of(headers: Message) -> str:
    """What names this version of a file: a strong ETag, its date, or "" if there is neither."""
    tag = headers["ETag"] or ""
    return tag if tag.startswith('"') else headers["Last-Modified"] or ""


def _check_space(part: Path, total: int | None, done: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - done > free:
        sizes = f"has {free / 1e9:.1f} GB free, but {(total - done) / 1e9:.1f} GB of {part.stem} are missing"
        raise ZooError(f"{part.parent} {sizes}: free disk space, or use another --data-root.")


def _check_md5(archive: Archive, file: Path) -> None:
    """Delete the file and raise ZooError unless it has the published checksum."""
    if not archive.md5:
        return
    from torchvision.datasets.utils import calculate_md5  # slow to import

    if (found := calculate_md5(file)) != archive.md5:
        file.unlink()
        problem = f"has the md5 {found}, but {archive.md5} is published. It was deleted"
        raise ZooError(f"{file.name} {problem}; run the same command again to download it from {archive.url}.")


def _cannot_download(archive: Archive, folder: Path, problem: str) -> ZooError:
    checked = f" (md5 {archive.md5})" if archive.md5 else ""
    advice = f"put {archive.filename}{checked} in {folder} yourself, and run the same command again"
    return ZooError(f"{archive.url} cannot be downloaded: {problem}. If it stays so, {advice}.")


def _note(part: Path) -> Path:
    """The file that names the version of the file of which `part` holds the beginning."""
    return part.with_name(f"{part.name}.version")


def _kept(archive: Archive, part: Path) -> tuple[int, str]:
    """The bytes that can be continued, and their version; none if neither that nor a checksum can tell them apart."""
    version = _note(part).read_text() if _note(part).exists() else ""
    return part.stat().st_size if part.exists() and (version or archive.md5) else 0, version


def unpack(archive: Archive, file: Path, folder: Path) -> None:
    """Put the archive's `places` under `folder`, where files appear only when all have been unpacked. ZooError if it is
    damaged or no archive, lacks one of the places, holds links or paths that lead out of it, or the disk is full."""
    damaged = f"{file} cannot be unpacked ({{}}): delete it, and run the same command again to download it once more."
    with writing_to(folder, "run the same command again"), as_zoo_error(damaged, *DAMAGED):
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


@cache
def unpacked(file: str) -> Path:
    """What is in the user's own archive, or in its only folder, in a temporary folder; ZooError as of `unpack`."""
    damaged = as_zoo_error(f"{file} cannot be unpacked ({{}}): is it a whole zip or tar file?", *DAMAGED, OSError)
    with damaged, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dcp_zoo-")))
        _extract(Path(file), Archive(file, places={"": ""}), folder)
        _temporary[folder] = Path(file).absolute(), stack.pop_all()
    inside = [path for path in folder.iterdir() if is_visible(path.name)]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def archive_of(path: Path) -> tuple[Path, str] | None:
    """The archive from which `unpacked` took a file, and the file's path in it; None for any other file."""
    for folder in path.parents:
        if folder in _temporary:
            return _temporary[folder][0], path.relative_to(folder).as_posix()
    return None


def _extract(file: Path, archive: Archive, target: Path) -> None:
    """The places in a zip or tar archive, or in the tar `inner` in a zip; ZooError before they fill the disk."""
    most, times = UNPACKED
    room = left = min(shutil.disk_usage(target).free, max(most, times * file.stat().st_size))

    def take(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            limit = f"{room / 1e9:.1f} GB, which is {times} times its own size, or what {target} has free"
            raise ZooError(f"{file} holds more than {limit}. If you trust it, unpack it yourself and pass the folder.")

    def is_needed(name: str) -> bool:
        """Whether it is in one of the places, and not one of the files that macOS adds."""
        inside = any(name.removeprefix("./").startswith(place and f"{place}/") for place in archive.places)
        return inside and not PurePosixPath(name).name.startswith("._")

    def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        if not is_needed(member.name):
            return None
        _check_path(member.name, file)
        take(member.size)
        if not (member.isfile() or member.isdir()):
            raise ZooError(f"{file}: {member.name} is a link or a device, which no dataset needs. Nothing was kept.")
        return tarfile.data_filter(member, path)

    if not zipfile.is_zipfile(file):
        if not tarfile.is_tarfile(file):  # whose own error has a line for each kind of compression
            raise ValueError("neither a zip nor a tar file")
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
            take(opened.getinfo(name).file_size)
        opened.extractall(target, names)


def _check_path(name: str, file: Path) -> None:
    """ZooError for a path that leads out of the folder on any system: Windows drops dots and spaces at the end."""
    parts = re.split(r"[/\\]", name)
    if any("\0" in part or ":" in part or (part.startswith("..") and not part.strip(". ")) for part in parts):
        raise ZooError(f"{file}: the path {name!r} leads out of the archive. Nothing was kept; do not trust this file.")


def _merge(source: Path, target: Path) -> None:
    """Move all files to the same place under `target`; ZooError for a folder there that is a link to elsewhere."""
    home = target.resolve()
    for path in sorted([source, *source.rglob("*")]):
        place = target / path.relative_to(source)
        if not path.is_dir():
            path.replace(place)
        elif place.resolve().is_relative_to(home):
            place.mkdir(parents=True, exist_ok=True)
        else:
            raise ZooError(f"{place} is a link out of {target}: remove it, and run the same command again.")
