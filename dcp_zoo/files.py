"""Atomic file writes, locks between processes, and hashes."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


def write_atomically(path: Path, write: Callable[[str], object], folder: Path | None = None) -> None:
    """Call `write` with the name of a temporary file, then move that file to `path`. The temporary file is next to
    `path`, or in another `folder` of the same file system.

    A crash leaves the old file or the new one, never part of one. Raises OSError if the folder is not writable.
    """
    handle, temporary = tempfile.mkstemp(dir=folder or path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power cut could leave an empty file under the new name
        os.chmod(temporary, 0o644)  # noqa: PTH101
        os.replace(temporary, path)  # noqa: PTH105
    finally:
        Path(temporary).unlink(missing_ok=True)


def try_writing(folder: Path) -> None:
    """Raise OSError unless files can be created in `folder`, or in its nearest parent if it does not exist yet."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    handle, temporary = tempfile.mkstemp(dir=place, prefix=".dcp_zoo.")
    os.close(handle)
    Path(temporary).unlink()


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Whether this process has the lock of this file, which no other has until the context or the process ends.

    The lock is the Hub client's, which also works where the file system has none. Raises OSError if the folder of the
    file is not writable.
    """
    from huggingface_hub.utils import WeakFileLock  # slow to import

    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(file, timeout=0.1))
        except TimeoutError:
            yield False
        else:
            yield True


def file_name(text: str) -> str:
    """A text as the name of a file: anything but letters, digits and `_.,=+-` becomes `_`."""
    return re.sub(r"[^\w.,=+-]", "_", text)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
