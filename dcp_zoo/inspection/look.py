"""Features of a frozen image tower, a small grey copy and statistics of each image, kept in the user's cache."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcp_zoo.data.images import ImageLike, in_threads, load_image
from dcp_zoo.data.progress import Progress, by_image, no_progress
from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.training.cache import features_folder, kept_features, per_image, tower_setting
from dcp_zoo.zoo.factory import create_transform

GREY, DETAIL, BATCH = 32, 128, 64  # pixels of the grey copy, and of the image whose sharpness is measured; images
STATISTICS = 5  # of each image


@dataclass(frozen=True)
class Seen:
    """What is known of n images; those that cannot be read have NaN."""

    parts: np.ndarray  # what a text probe reads: CLIP's embedding and what its image tower has before it, each
    widths: Sequence[int]  # normalised, float32 (n, E + V), and their widths
    grey: np.ndarray  # the images squeezed into a square, uint8 (n, 32, 32); 0 without an image
    statistics: np.ndarray  # float32 (n, 5), see `_measured`
    errors: dict[int, str]  # why an image cannot be read, by its position

    @property
    def features(self) -> np.ndarray:
        """CLIP's embeddings (n, E), of the length 1."""
        return self.parts[:, : self.widths[0]]

    @property
    def joined(self) -> np.ndarray:
        """All parts (n, E + V), of the length 1."""
        return self.parts / len(self.widths) ** 0.5


def look(images: Sequence[ImageLike], model: FrozenCLIP, keep: bool = False, progress: Progress = no_progress) -> Seen:
    """What is known of images, for `load_image`; with `keep`, those in the user's cache are not read again."""
    errors: dict[int, str] = {}

    def rows(positions: Sequence[int]) -> Iterable[Tensor]:
        batches, total = _rows(images, positions, model, errors), len(images)
        return by_image(progress, batches, "images", total, total - len(positions))

    with kept_features(features_folder()) if keep else nullcontext():
        found = per_image(images, lambda: tower_setting(model, "seen and read"), 1, rows)[0].numpy()
    grey, statistics, parts = np.split(found, (GREY**2, GREY**2 + STATISTICS), axis=1)
    grey = np.nan_to_num(grey).reshape(-1, GREY, GREY).astype(np.uint8)
    return Seen(parts, model.widths, grey, statistics, errors)


@torch.inference_mode()
def _rows(
    images: Sequence[ImageLike], positions: Sequence[int], model: FrozenCLIP, errors: dict[int, str]
) -> Iterator[Tensor]:
    """Batches (1, m, 1024 + 5 + E + V) of the grey copies, statistics and features of images at these positions, NaN
    for those that cannot be read, of which `errors` then say why."""
    transform = create_transform(model)

    def read(image: ImageLike) -> tuple[Tensor, Tensor] | str:
        try:
            pixels = load_image(image)
        except ZooError as error:
            return error.reason
        return _measured(pixels), transform(pixels)

    for start in range(0, len(positions), BATCH):
        part = positions[start : start + BATCH]
        batch = dict(zip(part, in_threads(read, (images[i] for i in part)), strict=True))
        errors |= {i: answer for i, answer in batch.items() if isinstance(answer, str)}
        read_here = [place for place, i in enumerate(part) if i not in errors]
        rows = torch.full((len(part), GREY**2 + STATISTICS + sum(model.widths)), math.nan)
        if read_here:
            measured, inputs = map(torch.stack, zip(*(batch[part[place]] for place in read_here), strict=True))
            features = model.read(inputs.to(model.device)).float().cpu()
            rows[read_here] = torch.cat([measured, features], 1)
        yield rows[None]


def _measured(image: Image.Image) -> Tensor:
    """The grey copy of an image and its statistics, (1024 + 5,): width and height, the 5th and 99th percentile of
    the grey levels from 0 to 1, and the 98th of second differences between pixels, as a share of the contrast."""
    grey = image.convert("L")
    small = grey.resize((GREY, GREY), reducing_gap=2.0)
    grey.thumbnail((DETAIL, DETAIL))
    levels = np.asarray(grey, np.float32) / 255
    low, high = np.percentile(levels, (5, 99))
    edges = np.concatenate([np.diff(levels, 2, axis).ravel() for axis in (0, 1)])
    detail = np.percentile(np.abs(edges), 98) / max(high - low, 0.02) if len(edges) else np.nan
    return torch.tensor([*np.asarray(small).ravel(), *image.size, low, high, detail], dtype=torch.float32)
