"""Features of a frozen image tower, a small grey copy of each image, and when it was taken, in the user's cache."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data.groups import FACTS, numbers
from dcp_zoo.data.images import ImageLike, Progress, by_image, in_threads, load_with_facts, no_progress
from dcp_zoo.errors import ZooError, attempted
from dcp_zoo.training.cache import features_folder, kept_features, per_image, tower_setting
from dcp_zoo.zoo.factory import create_transform

BATCH = 64  # images


@dataclass(frozen=True)
class Seen:
    """What is known of n images; those that cannot be read have NaN."""

    parts: np.ndarray  # what a text probe reads: CLIP's embedding and what its image tower has before it, each
    widths: Sequence[int]  # normalised, float32 (n, E + V), and their widths
    facts: np.ndarray  # their `numbers` (n, 1027)
    errors: dict[int, str]  # why an image cannot be read, by its position

    @property
    def joined(self) -> np.ndarray:
        """All parts (n, E + V), of the length 1."""
        return self.parts / len(self.widths) ** 0.5


def look(images: Sequence[ImageLike], model: FrozenCLIP, keep: bool = False, progress: Progress = no_progress) -> Seen:
    """What is known of images, for `load_image`; with `keep`, those in the user's cache are not read again."""
    errors: dict[int, str] = {}
    transform, widths = create_transform(model), model.joined_widths

    def read(image: ImageLike) -> tuple[Tensor, Tensor]:
        pixels, facts = load_with_facts(image)
        return torch.from_numpy(numbers(facts)), transform(pixels)

    @torch.inference_mode()
    def batches(positions: Sequence[int]) -> Iterator[Tensor]:
        """Facts and features (1, m, 1027 + E + V) of some images, NaN for those that have `errors`."""
        for start in range(0, len(positions), BATCH):
            part = positions[start : start + BATCH]
            answers = in_threads(partial(attempted, read), [images[i] for i in part])
            errors.update({i: each.reason for i, each in zip(part, answers, strict=True) if isinstance(each, ZooError)})
            rows = torch.full((len(part), FACTS + sum(widths)), math.nan)
            if found := [each for each in answers if not isinstance(each, ZooError)]:
                facts, inputs = map(torch.stack, zip(*found, strict=True))
                features = model.read(inputs.to(model.device), len(widths)).float().cpu()
                rows[[i not in errors for i in part]] = torch.cat([facts, features], 1)
            yield rows[None]

    def compute(positions: Sequence[int]) -> Iterable[Tensor]:
        return by_image(progress, batches(positions), "images", len(images), len(images) - len(positions))

    with kept_features(features_folder()) if keep else nullcontext():
        known = per_image(images, lambda: tower_setting(model, "facts and read"), 1, compute)[0].numpy()
    return Seen(known[:, FACTS:], widths, known[:, :FACTS], errors)
