"""Tokens and features of a frozen image tower, kept from fit to fit: by image, weights and preprocessing."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dcp_zoo.backbone.clip import Encoder
from dcp_zoo.data.images import pixels_sha256
from dcp_zoo.errors import UNREADABLE, ZooError, attempted, warn
from dcp_zoo.files import cache_folder, write_file

MEMORY_LIMIT, FILE_LIMIT = 2**29, 2**32  # bytes
OFF = "DCP_ZOO_NO_FEATURE_CACHE"  # an environment variable
ADVICE = f"choose another DCP_ZOO_CACHE (in Python memory=), or set {OFF}=1"
ALL_PARTS, ONE_READING = "all features", "features"  # what is kept: all that plain CLIP says, or another reading
END = ".safetensors"


class FeatureCache:
    """Tensors (views, ...) by setting and image, in memory or in `folder`, there in a file for each batch. The oldest
    go at `limit` bytes, in a folder when it is opened. A file that cannot be read is passed over; if the folder cannot
    be written, a warning says so, once."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit or (MEMORY_LIMIT if folder is None else FILE_LIMIT)
        self._memory, self._lock, self._writable = dict[tuple[str, str], Tensor](), Lock(), True
        with suppress(OSError):  # another process has just removed a file
            paths = [] if folder is None else folder.glob(f"*/*{END}")
            files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in paths)
            surplus = sum(size for _, size, _ in files) - self.limit
            while surplus > 0:
                surplus -= files[0][1]
                files.pop(0)[2].unlink()

    def get(self, setting: str, keys: set[str]) -> dict[str, Tensor]:
        """What is kept of these images, with as many views as there are."""
        if self.folder is None:
            kept = {key: self._memory.get((setting, key)) for key in keys}
            return {key: value for key, value in kept.items() if value is not None}
        tensors = dict[str, Tensor]()
        for path in (self.folder / setting).glob(f"*{END}"):
            with suppress(SafetensorError, *UNREADABLE), safe_open(path, "pt") as file:
                names = file.metadata()["keys"].split()
                batch = file.get_tensor("batch") if keys.intersection(names) else ()
                for key, value in zip(names, batch, strict=False):
                    if len(value) > len(tensors.get(key, ())):
                        tensors[key] = value
        return tensors

    def put(self, setting: str, values: Mapping[str, Tensor]) -> None:
        if self.folder is None:
            with self._lock:
                self._memory |= {(setting, key): value.clone() for key, value in values.items()}
                surplus = sum(value.nbytes for value in self._memory.values()) - self.limit
                while surplus > 0:
                    surplus -= self._memory.pop(next(iter(self._memory))).nbytes
        elif values and self._writable:
            content = save({"batch": torch.stack([*values.values()])}, {"keys": " ".join(values)})
            path = self.folder / setting / f"{uuid4().hex}{END}"
            if isinstance(error := attempted(write_file, path, content, ADVICE), ZooError):
                self._writable = False
                warn(f"Image features are not cached for the next run. {error}")


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
    name, keys = _hashed(setting()), [key and _hashed(key) for key in map(image_key, images)]
    kept = cache.get(name, set(filter(None, keys)))
    rows = {i: kept[key][:views] for i, key in enumerate(keys) if len(kept.get(key, ())) >= views}
    missing = [i for i in range(len(images)) if i not in rows]
    left = iter(missing)
    for batch in compute(missing) if missing else ():
        new = dict(zip(islice(left, batch.shape[1]), batch.unbind(1), strict=True))  # each (views, ...)
        known = {i: parts for i, parts in new.items() if keys[i] and not parts[(0,) * parts.ndim].isnan()}
        cache.put(name, {keys[i]: parts for i, parts in known.items()})
        rows |= new
    return torch.stack([rows[i] for i in range(len(images))], 1)


def _hashed(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def image_key(image: str | Path | Image.Image) -> str:
    """A file by its path, time and size, or an image in memory by its pixels; "" for what could change unnoticed, or
    cannot be read."""
    if not isinstance(image, (str, Path)):
        key = attempted(pixels_sha256, image)
        return "" if isinstance(key, ZooError) else key
    path = Path(image).absolute()
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{path} {status.st_mtime_ns} {status.st_size}"


def tower_setting(model: Encoder, what: str, precision: str = "float32") -> str:
    """What features of a frozen encoder depend on besides the images."""
    what += "" if precision == "float32" else f" in {precision}"
    return f"{what} {[*model.parts]} {model.identity()} {model.device.type} {model.preprocessing} {computed_by()}"


@cache
def computed_by() -> str:
    """The versions of what reads images and computes features."""
    return f"{version('dcp_zoo')} {[version(name) for name in ('torch', 'torchvision', 'timm', 'Pillow')]}"
