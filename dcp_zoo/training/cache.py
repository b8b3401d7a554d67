"""Tokens and features of a frozen image tower, kept from fit to fit: by image, weights and preprocessing."""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from dcp_zoo._version import __version__
from dcp_zoo.backbone.clip import Encoder
from dcp_zoo.data.images import pixels_sha256
from dcp_zoo.errors import ZooError, attempted, warn
from dcp_zoo.files import cache_folder

MEMORY_LIMIT, FILE_LIMIT = 2**29, 2**32  # bytes
FILE_NAME, MEMORY = "towers.sqlite", ":memory:"  # the latter is SQLite's name
OFF = "DCP_ZOO_NO_FEATURE_CACHE"  # an environment variable
PATIENCE = 5.0  # seconds that another process may hold the file
WHOLE = ("locked", "readonly", "full", "unable to open")  # in SQLite's errors about a file that is not damaged
ALL_PARTS, ONE_READING = "all features", "features"  # what is kept: all that plain CLIP says, or another reading
SEAL = 32  # bytes of a checksum before each value
SIZE = """SELECT (page_count - freelist_count) * page_size
    FROM pragma_page_count(), pragma_freelist_count(), pragma_page_size()"""
DELETE_OLDEST = "DELETE FROM kept WHERE rowid IN (SELECT rowid FROM kept ORDER BY rowid LIMIT 10)"


class FeatureCache:
    """Tensors by key, in a file in `folder` for all processes or in memory. A killed process leaves what it has put.
    The oldest go at `limit` bytes; damaged values are not returned. If the file is damaged, held by another process, or
    cannot be written, a warning says so, and this cache goes on in memory; a damaged file is deleted."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.place = MEMORY if folder is None else str(folder / FILE_NAME)
        self.limit = limit or (MEMORY_LIMIT if folder is None else FILE_LIMIT)
        self._lock, self._memory = threading.Lock(), _connected(self.place) if folder is None else None

    def get(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """What is kept of these."""
        found = {}
        with self._open() as file:
            for key in keys:
                row = file.execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone()
                if row and isinstance(row[0], bytes) and row[0] == _sealed(key, row[0][SEAL:]):
                    found[key] = load(row[0][SEAL:])["value"]
        return found

    def put(self, values: Mapping[str, Tensor]) -> None:
        with self._open() as file:
            while file.execute(SIZE).fetchone()[0] > self.limit and file.execute(DELETE_OLDEST).rowcount:
                pass
            rows = ((key, _sealed(key, save({"value": value.contiguous()}))) for key, value in values.items())
            file.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The file, or what is in memory, for one transaction, which ends early if the file cannot be used."""
        with self._lock:
            try:
                file = self._memory or _connected(self.place)
            except (OSError, sqlite3.Error) as error:
                file = self._in_memory(error)
            try:
                with file:
                    yield file
            except sqlite3.Error as error:
                self._in_memory(error)
            finally:
                if file is not self._memory:
                    file.close()

    def _in_memory(self, error: Exception) -> sqlite3.Connection:
        """Go on without the file after an error, and delete it unless the error says that it is whole."""
        if not any(word in str(error) for word in WHOLE):
            with suppress(OSError):
                for file in (self.place, f"{self.place}-journal"):  # which would be applied to the next file
                    Path(file).unlink(missing_ok=True)
        self.limit, self._memory = min(self.limit, MEMORY_LIMIT), _connected(MEMORY)
        problem = f"Cannot write to {self.place}: {getattr(error, 'strerror', None) or error}."
        advice = f"Choose another DCP_ZOO_CACHE (in Python memory=), or set {OFF}=1."
        warn(f"Image features are not cached for the next run. {problem} {advice}")
        return self._memory


def _connected(place: str) -> sqlite3.Connection:
    """The file at this place, with its table."""
    if place != MEMORY:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(place, timeout=PATIENCE, check_same_thread=False)
    try:
        file.text_factory = bytes  # what is no value need not be UTF-8
        file.execute("PRAGMA synchronous = OFF")
        file.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value BLOB)")
    except sqlite3.Error:
        file.close()
        raise
    return file


def _sealed(key: str, content: bytes) -> bytes:
    """The content after a checksum of it and its key."""
    return sha256(key.encode() + content).digest() + content


_active: ContextVar[FeatureCache | None] = ContextVar("feature cache", default=None)
_memory = FeatureCache()


def features_folder() -> Path | None:
    """Where commands keep features of the user's images; None if that is switched off."""
    return None if os.environ.get(OFF) else cache_folder("features")


@contextmanager
def kept_features(memory: Any = None) -> Iterator[None]:
    """Inside this context `per_image` keeps what it computes: in a folder, which may be that of a joblib.Memory; in the
    memory of this process for None; nowhere for False."""
    place = getattr(memory, "location", memory)
    folder = None if place in (None, False) else Path(place).expanduser().absolute()
    token = _active.set(None if place is False else FeatureCache(folder) if folder else _memory)
    try:
        yield
    finally:
        _active.reset(token)


def keeps_features() -> bool:
    """Whether this is inside `kept_features`."""
    return _active.get() is not None


def per_image(
    images: Sequence[str | Path | Image.Image],
    setting: Callable[[], str],
    views: int,
    compute: Callable[[Sequence[int]], Iterable[Tensor]],
) -> Tensor:
    """Tensors (views, n, ...) of images for `load_image`, of which view 0 is the same with one view and with two:
    `compute` of all, or inside `kept_features` of those that are not kept. `setting` says what they depend on besides
    the images; `compute` yields batches (views, m, ...) of these positions, on the CPU, kept at once, but for NaN."""
    cache = _active.get()
    if cache is None:
        return torch.cat(list(compute(range(len(images)))), 1)
    name = setting()
    keys = [
        [
            sha256(f"{name} {key} {view}".encode("utf-8", "surrogateescape")).hexdigest()
            for view in range(views if key else 0)
        ]
        for key in map(image_key, images)
    ]
    found = cache.get(key for own in keys for key in own)
    rows = {i: [found[key] for key in own] for i, own in enumerate(keys) if own and all(key in found for key in own)}
    missing = [i for i in range(len(images)) if i not in rows]
    left = iter(missing)
    for batch in compute(missing) if missing else ():
        new = dict(zip(islice(left, batch.shape[1]), batch.unbind(1), strict=True))  # each (views, ...)
        known = {i: parts for i, parts in new.items() if not parts[(0,) * parts.ndim].isnan()}
        cache.put({key: part for i, parts in known.items() for key, part in zip(keys[i], parts, strict=False)})
        rows |= {i: list(parts.unbind()) for i, parts in new.items()}
    return torch.stack([torch.stack([rows[i][view] for i in range(len(images))]) for view in range(views)])


def image_key(image: str | Path | Image.Image) -> str:
    """A file by its path, time and size, or an image in memory by its pixels; "" for what could change unnoticed, or
    cannot be read."""
    if not isinstance(image, (str, Path)):
        key = attempted(pixels_sha256, image)
        return "" if isinstance(key, ZooError) else key
    path = Path(image).absolute()
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{path} {found.st_mtime_ns} {found.st_size}"


def tower_setting(model: Encoder, what: str, precision: str = "float32") -> str:
    """What features of a frozen encoder depend on besides the images."""
    what += "" if precision == "float32" else f" in {precision}"
    return f"{what} {model.identity()} {model.device.type} {model.preprocessing} {computed_by()}"


@cache
def computed_by() -> str:
    """The versions of what reads images and computes features."""
    return f"{__version__} {[version(name) for name in ('torch', 'torchvision', 'timm', 'Pillow')]}"
