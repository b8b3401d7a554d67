"""Tokens and features of a frozen image tower, kept from fit to fit: by image, weights and preprocessing."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dcp_zoo.errors import UNREADABLE, ZooError, attempted, warn
from dcp_zoo.features import LIBRARIES
from dcp_zoo.files import cache_folder, text_sha256, write_file

MEMORY_LIMIT = 2**29  # bytes
FILE_LIMIT = 2**32
OFF = "DCP_ZOO_NO_FEATURE_CACHE"  # an environment variable
ADVICE = f"choose another DCP_ZOO_CACHE (in Python memory=), or set {OFF}=1"
END = ".safetensors"


class FeatureCache:
    """Rows of features by setting and image, in memory, or in a folder with a file for each batch.

    A file that cannot be read is passed over; if the folder cannot be written, a warning says so, once.

    Args:
        folder: where the files are. Default: in memory.
        limit: bytes, beyond which the oldest rows go, in a folder when it is opened. Default: 512 MB,
            in a folder 4 GB.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit or (MEMORY_LIMIT if folder is None else FILE_LIMIT)
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._bytes = 0  # in memory
        self._lock = Lock()
        self._writable = True
        if folder is not None:
            size = 0
            with suppress(OSError):  # another process has just removed a file
                for path in sorted(folder.glob(f"*/*{END}"), key=lambda path: -path.stat().st_mtime_ns):
                    size += path.stat().st_size
                    if size > self.limit:
                        path.unlink()

    def get(self, setting: str, keys: Sequence[str]) -> dict[str, Tensor]:
        """The rows that are kept of the images with these keys."""
        if self.folder is None:
            with self._lock:
                return {key: self._memory[setting, key] for key in keys if (setting, key) in self._memory}
        names = {text_sha256(key): key for key in keys if key}
        rows: dict[str, Tensor] = {}
        for path in (self.folder / text_sha256(setting)).glob(f"*{END}"):
            with suppress(SafetensorError, *UNREADABLE), safe_open(path, "pt") as file:
                stored = file.metadata()["keys"].split()
                if names.keys().isdisjoint(stored):
                    continue
                batch = file.get_tensor("batch")
                rows |= {names[name]: row for name, row in zip(stored, batch, strict=False) if name in names}
        return rows

    def put(self, setting: str, rows: Mapping[str, Tensor]) -> None:
        """Keep rows by the keys of their images; "" is the key of an image that must not be kept."""
        rows = {key: row for key, row in rows.items() if key}
        if self.folder is None:
            with self._lock:
                new = {(setting, key): row.clone() for key, row in rows.items() if (setting, key) not in self._memory}
                self._memory |= new
                self._bytes += sum(row.nbytes for row in new.values())
                while self._bytes > self.limit:
                    self._bytes -= self._memory.pop(next(iter(self._memory))).nbytes
        elif rows and self._writable:
            names = " ".join(map(text_sha256, rows))
            content = save({"batch": torch.stack([*rows.values()])}, {"keys": names})
            path = self.folder / text_sha256(setting) / f"{uuid4().hex}{END}"
            error = attempted(write_file, path, content, ADVICE)
            if isinstance(error, ZooError):
                self._writable = False
                warn(f"Image features are not cached for the next run. {error}")


active_cache: ContextVar[FeatureCache | None] = ContextVar("active_cache", default=None)  # None keeps nothing
_memory = FeatureCache()


@contextmanager
def kept_features(memory: Any = None) -> Iterator[None]:
    """Inside this context a `FeatureExtractor` keeps what it computes.

    Args:
        memory: a folder or a joblib.Memory, in whose folder features are kept, or a `FeatureCache`. None
            keeps them in the memory of this process; False keeps nothing.
    """
    cache = getattr(memory, "location", memory)
    if memory is False:
        cache = None
    elif cache is None:
        cache = _memory
    elif not isinstance(cache, FeatureCache):
        cache = FeatureCache(Path(cache).expanduser().absolute())
    token = active_cache.set(cache)
    try:
        yield
    finally:
        active_cache.reset(token)


@contextmanager
def users_cache() -> Iterator[None]:
    """Inside this context features are kept in the user's cache folder, or in memory if that folder is
    switched off."""
    with kept_features(None if os.environ.get(OFF) else cache_folder("features")):
        yield


@contextmanager
def shared_features() -> Iterator[None]:
    """Inside this context no feature is computed twice: they are kept as they are outside or, if
    nothing is kept there, until its end."""
    with kept_features(active_cache.get() or FeatureCache()):
        yield


@cache
def computed_by() -> str:
    """The versions of what reads images and computes features."""
    return f"{version('dcp_zoo')} {[version(name) for name in LIBRARIES]}"
