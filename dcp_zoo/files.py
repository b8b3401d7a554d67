"""Atomic file writes, locks between processes, hashes, and the user's cache."""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from mimetypes import guess_type
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from uuid import uuid4

from dcp_zoo.errors import ZooError, writing_to

LOCK = ".lock"
IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .bmp .gif .ppm .pgm .tif .tiff .webp .avif .heic .heif".split())
# The most that is read, so that no file fills the memory; those of a server are in `dcp_zoo.serve`.
MAX_PIXELS = 180_000_000  # of an image: more than the largest cameras; a GIF of this size took 3 s and 0.9 GB
MAX_BYTES = 100_000_000  # of a file that is read as a whole


Content = Callable[[str], object] | str | bytes  # of a file, or what writes one with this name


def write_file(path: Path, write: Content, otherwise: str = "choose another --output") -> None:
    """Call `write` with the name of a temporary file next to `path`, or put this content there; then move it to
    `path`: a crash leaves the old file or the new one. Modes and symbolic links stay. ZooError, with the advice
    `otherwise`, if that is not possible, or if `path` is a folder, pipe or device."""
    with writing_to(path, otherwise):
        path = path.resolve()  # of a link, which stays
        if path.exists():
            check_regular(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name[:50]}.{uuid4().hex}"  # unlike those of `tempfile` of the user's mode
        try:
            if callable(write):
                write(str(temporary))
            else:
                temporary.write_bytes(write.encode() if isinstance(write, str) else write)
            if path.exists():
                shutil.copymode(path, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # otherwise a power cut could leave an empty file under the new name
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path, otherwise: str = "choose another --output") -> None:
    """Raise ZooError unless files can be created in `folder`, or in its nearest parent if it does not exist
    yet."""
    with writing_to(folder, otherwise):
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        TemporaryFile(dir=existing).close()


def check_output(file: Path, overwrite: bool, option: str = "--output") -> None:
    """ZooError for an output file that cannot be written, or that exists, unless `overwrite` and no image or
    video."""
    advice = f"choose another {option}"
    if file.exists():
        with writing_to(file, advice):
            check_regular(file)
        kind, _ = guess_type(os.path.realpath(file))
        if kind and kind.startswith(("image/", "video/")):
            raise ZooError(f"{file} exists already: {advice}.")
        if not overwrite:
            raise ZooError(f"{file} exists already: {advice}, or pass --overwrite.")
    check_writable(file.parent, advice)


def check_outside(folder: Path, images: str | Path) -> None:
    """ZooError for an output folder in a folder of images: the next run would find the copies there."""
    if Path(images).is_dir() and folder.resolve().is_relative_to(Path(images).resolve()):
        raise ZooError(f"{folder} is among the images of {images}: choose a folder elsewhere for --output.")


def check_empty(folder: Path) -> None:
    """Raise ZooError unless the folder can be created, or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZooError(f"{folder} exists already: choose a new or empty folder for --output.")


def check_regular(path: str | Path) -> None:
    """Raise OSError for what is no file on a disk: to open a pipe or a device may last for ever."""
    mode = os.stat(path).st_mode  # noqa: PTH116
    if not stat.S_ISREG(mode):
        raise OSError(f"it is a {'folder' if stat.S_ISDIR(mode) else 'pipe, socket or device'}, not a file")


def read_plain(path: str | Path, most: int = MAX_BYTES) -> bytes:
    """What is in a file; OSError for what is no file on a disk, and for more than so many bytes."""
    check_regular(path)
    with Path(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has more than {most:,} bytes")
    return content


@contextmanager
def locked(file: Path, taken: str, seconds: float = 0.1) -> Iterator[None]:
    """A context in which this process has the lock of this file; ZooError with the text `taken` if another one
    has it for that many seconds more, or if the folder is not writable. The Hub client's lock also works
    where the file system has none."""
    from huggingface_hub.utils import WeakFileLock  # slow to import

    is_new = not file.parent.exists()
    with ExitStack() as stack:
        with writing_to(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(WeakFileLock(file, timeout=seconds))
            except TimeoutError as error:
                raise ZooError(taken) from error
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                file.unlink()
                if is_new:
                    file.parent.rmdir()  # which fails unless nothing was written there


_alone: ContextVar[frozenset[Path]] = ContextVar("_alone", default=frozenset())  # folders whose lock this thread has


@contextmanager
def alone_in(directory: Path, seconds: float = 0.1) -> Iterator[None]:
    """A context with the lock of a folder, to write a head there. It waits for the lock for so many seconds,
    and may be entered again within itself. ZooError if another process has the lock."""
    folder = directory.absolute()
    if folder in _alone.get():
        yield
        return
    taken = f"Another process trains or saves a head in {directory}: wait, or choose another --output."
    with locked(directory / LOCK, taken, seconds):
        token = _alone.set(_alone.get() | {folder})
        try:
            yield
        finally:
            _alone.reset(token)


# control characters, which a terminal obeys; marks that reverse the direction of writing; bytes that are no
# UTF-8
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A name as it may be shown to people: on one line, with escapes such as \\x1b for what is `HIDDEN`."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """The same of a text with several lines."""
    return "\n".join(map(printable, text.split("\n")))


def file_name(text: str) -> str:
    """A text as the name of a file: anything but letters, digits and `_.,=+-` becomes `_`."""
    return re.sub(r"[^\w.,=+-]", "_", text)


def packed(files: Iterable[Path]) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in files}


@contextmanager
def unpacked(files: dict[str, bytes]) -> Iterator[str]:
    """A folder with such files, which is removed at the end of the context."""
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        yield folder


def file_state(path: str | Path) -> list[int] | None:
    """When a file was changed, in nanoseconds, and its size in bytes: a file that was replaced has others,
    and its old results are not its own. None if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # ValueError: of a name that no system has
        return None
    return [status.st_mtime_ns, status.st_size]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def text_sha256(text: str) -> str:
    """A hash of a text, in which names of files need not be UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def cache_folder(name: str) -> Path:
    """A folder in DCP_ZOO_CACHE or in the user's cache, which whoever writes there makes."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dcp_zoo")
    return Path(os.environ.get("DCP_ZOO_CACHE") or users).expanduser() / name
