"""Zip and tar archives, the user's own and those of datasets: nothing leads out of a folder or fills the disk."""

import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from dcp_zoo.data.paths import is_visible
from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.files import UNPACKED

# what the standard library raises for archives it cannot read, encrypted ones included
DAMAGED = (tarfile.TarError, zipfile.error, zlib.error, lzma.LZMAError, EOFError, KeyError, ValueError, RuntimeError)

# folders that are removed when the process ends, and the archives that were unpacked into them
_temporary: dict[Path, tuple[Path, ExitStack]] = {}


@cache
def unpacked(file: str) -> Path:
    """What is in the user's own archive, or in its only folder, in a temporary folder; ZooError as of `extract`."""
    damaged = as_zoo_error(f"{file} cannot be unpacked ({{}}): is it a whole zip or tar file?", *DAMAGED, OSError)
    with damaged, ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="dcp_zoo-")))
        extract(Path(file), folder)
        _temporary[folder] = Path(file).absolute(), stack.pop_all()
    inside = [path for path in folder.iterdir() if is_visible(path.name)]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def archive_of(path: Path) -> tuple[Path, str] | None:
    """The archive from which `unpacked` took a file, and the file's path in it; None for any other file."""
    for folder in path.parents:
        if folder in _temporary:
            return _temporary[folder][0], path.relative_to(folder).as_posix()
    return None


def extract(file: Path, target: Path, places: Sequence[str] = ("",), inner: str = "") -> None:
    """Unpack folders of a zip or tar archive, or of the tar `inner` in a zip, without what macOS adds. One of `DAMAGED`
    if it cannot be read; ZooError for a link or device in it, and before it fills the disk: it may hold `UNPACKED`."""
    most, times = UNPACKED
    room = left = min(shutil.disk_usage(target).free, max(most, times * file.stat().st_size))

    def is_needed(name: str, size: int) -> bool:
        nonlocal left
        inside = any(name.removeprefix("./").startswith(place and f"{place}/") for place in places)
        if not inside or PurePosixPath(name).name.startswith("._"):
            return False
        left -= size
        if left < 0:
            limit = f"{room / 1e9:.1f} GB, which is {times} times its own size, or what {target} has free"
            raise ZooError(f"{file} holds more than {limit}. If you trust it, unpack it yourself and pass the folder.")
        return True

    def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        if not is_needed(member.name, member.size):
            return None
        if not (member.isfile() or member.isdir()):
            raise ZooError(f"{file}: {member.name} is a link or a device, which no dataset needs. Nothing was kept.")
        return tarfile.data_filter(member, path)  # which refuses paths that lead out

    if not zipfile.is_zipfile(file):
        if not tarfile.is_tarfile(file):  # whose own error has a line for each kind of compression
            raise ValueError("neither a zip nor a tar file")
        with tarfile.open(file) as tar:
            tar.extractall(target, filter=checked)
        return
    with zipfile.ZipFile(file) as opened:
        if inner:
            with opened.open(inner) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                tar.extractall(target, filter=checked)
        else:  # its paths stay inside: the standard library drops what would lead out
            opened.extractall(target, [m.filename for m in opened.infolist() if is_needed(m.filename, m.file_size)])
