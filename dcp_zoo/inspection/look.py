"""What is known of each image: features of a frozen image tower, a small grey copy, and a few statistics.

They are kept in the user's cache, in a .npz file per folder and model, so that every image is read once. Its arrays
`image` and `features` are those of `predict --features`.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch

from dcp_zoo.data.images import jpeg_base64, load_image
from dcp_zoo.deploy.bulk.outputs import as_unicode
from dcp_zoo.errors import ZooError
from dcp_zoo.files import cache_folder, file_name, write_file
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.training.cache import image_key, tower_setting
from dcp_zoo.training.sources import Progress, no_progress
from dcp_zoo.zoo.factory import create_transform

ARRAYS = ("image", "features", "grey", "statistics")  # of the stored file, besides `key`
Row = tuple[Any, ...]  # name, features (E,), grey copy, statistics
GREY, DETAIL, BATCH = 32, 128, 64  # pixels of the grey copy, and of the image whose sharpness is measured; images
SIDE = 160  # pixels of a thumbnail's longer side


class Statistics(NamedTuple):
    """Of one image, or arrays (n,) of many."""

    width: Any  # in pixels
    height: Any
    low: Any  # the 5th and 99th percentile of its grey levels, from 0 to 1
    high: Any
    detail: Any  # 98th percentile of second differences between neighbouring pixels, as a share of the contrast


def thumbnails(paths: Sequence[str]) -> list[str]:
    """The images as small JPEGs in base64; PIL decodes outside the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: jpeg_base64(load_image(path), SIDE), paths))


@dataclass(frozen=True)
class Seen:
    """What is known of n images; those that cannot be read have NaN."""

    features: np.ndarray  # normalised, float32 (n, E)
    grey: np.ndarray  # the images squeezed into a square, uint8 (n, 32, 32)
    statistics: Statistics
    errors: dict[int, str]  # why an image cannot be read, by its position


def look(
    images: Sequence[Any], model: FrozenCLIP, folder: str | Path | None = None, progress: Progress = no_progress
) -> Seen:
    """See the images, for `load_image`; with the name of their `folder`, those that are not in the cache."""
    keys = [image_key(image) for image in images]
    file = None
    if folder is not None:
        place = f"{Path(folder).absolute()} {tower_setting(model, 'seen')}".encode("utf-8", "surrogateescape")
        name = f"{file_name(Path(folder).absolute().name)[:50]}-{sha256(place).hexdigest()[:16]}.npz"
        file = cache_folder() / "features" / name
    known = {} if file is None else _stored(file)
    rows = {i: known[key] for i, key in enumerate(keys) if key in known}
    new = [i for i in range(len(keys)) if i not in rows]
    found = progress(_each([images[i] for i in new], model), "images", len(new))
    answers = dict(zip(new, found, strict=True))
    errors = {i: answer for i, answer in answers.items() if isinstance(answer, str)}
    rows |= {i: answer for i, answer in answers.items() if i not in errors}
    if file is not None and len(errors) < len(new):
        _store(file, known | {keys[i]: row for i, row in rows.items() if keys[i]})
    nothing = "", np.full(model.num_features, np.nan, np.float32), np.zeros((GREY, GREY), np.uint8), np.full(5, np.nan)
    columns = zip(*(rows.get(i, nothing)[1:] for i in range(len(keys))), strict=True)
    features, grey, statistics = map(np.stack, columns)
    return Seen(features, grey, Statistics(*statistics.T), errors)


@torch.inference_mode()
def _each(images: Sequence[Any], model: FrozenCLIP) -> Iterable[Row | str]:
    """What is known of each image, or why it cannot be read."""
    transform = create_transform(model)

    def read(image: Any) -> tuple[Any, ...] | str:
        try:
            pixels = load_image(image)
        except ZooError as error:
            return str(error)
        return as_unicode(str(image)), transform(pixels), *_measured(pixels)

    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter lock
        for start in range(0, len(images), BATCH):
            batch = list(pool.map(read, images[start : start + BATCH]))
            inputs = [one[1] for one in batch if not isinstance(one, str)]
            features = iter(model.encode_image(torch.stack(inputs).to(model.device)).float().cpu() if inputs else ())
            yield from (one if isinstance(one, str) else (one[0], next(features).numpy(), *one[2:]) for one in batch)


def _measured(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """The grey copy and the statistics of an image."""
    grey = image.convert("L")
    small = grey.resize((GREY, GREY), reducing_gap=2.0)
    grey.thumbnail((DETAIL, DETAIL))
    levels = np.asarray(grey, np.float32) / 255
    low, high = np.percentile(levels, (5, 99))
    edges = np.concatenate([np.diff(levels, 2, axis).ravel() for axis in (0, 1)])
    detail = np.percentile(np.abs(edges), 98) / max(high - low, 0.02) if len(edges) else np.nan
    return np.asarray(small), np.array([*image.size, low, high, detail], np.float32)


def _stored(file: Path) -> dict[str, Row]:
    """What is known by `image_key`; nothing of a damaged file."""
    try:
        with np.load(file) as arrays:
            rows = zip(*(arrays[name] for name in ARRAYS), strict=True)
            return dict(zip(arrays["key"].tolist(), rows, strict=True))
    except (OSError, ValueError, KeyError, BadZipFile):
        return {}


def _store(file: Path, known: dict[str, Row]) -> None:
    columns: dict[str, Any] = dict(zip(ARRAYS, map(np.array, zip(*known.values(), strict=True)), strict=True))

    def write(path: str) -> None:
        with Path(path).open("wb") as stream:
            np.savez(stream, key=np.array([*known]), **columns)

    write_file(file, write, "set DCP_ZOO_CACHE to another folder")
