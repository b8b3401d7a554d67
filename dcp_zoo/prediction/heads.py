"""Predictors of heads, by PyTorch. Features are computed in the precision asked for; what follows is of the head's own,
as small differences of features are large ones of logits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import Outputs
from dcp_zoo.backbone.classes import NO_CLASSES
from dcp_zoo.backbone.clip import FrozenCLIP, Reading, joined, parts_of
from dcp_zoo.data.images import ImageLike, Progress, by_image, no_progress
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction.predictor import Errors, Predictor, decoded
from dcp_zoo.training.cache import ALL_PARTS, ONE_READING, keeps_features, per_image, tower_setting
from dcp_zoo.training.device import autocast, pick_precision
from dcp_zoo.training.evaluation import FEATURES_AT_A_TIME
from dcp_zoo.training.recipes import AUTO

FEW = 16  # images, for which fusing a head takes longer than it saves


@dataclass(frozen=True)
class HeadPredictor(Predictor):
    """Of a head; inside `kept_features` it computes no features that are kept."""

    runs: "TorchHead" = field(kw_only=True)

    def outputs(
        self, images: Sequence[ImageLike], batch_size: int, progress: Progress = no_progress
    ) -> tuple[Outputs, Errors]:
        if not (images and keeps_features() and self.runs.stored):
            return super().outputs(images, batch_size, progress)
        features, errors = self.runs.kept(images, batch_size, progress)
        return self.classify(features[[error is None for error in errors]]), errors


def torch_predictor(
    head: Head,
    features: bool = False,
    precision: str = AUTO,
    reject: float | None = None,
    images: int | None = None,
    alone: bool = True,
) -> HeadPredictor:
    """A head on its device. ZooError without classes, for an unknown precision, or for features without stored
    statistics.

    Args:
        features: whether the outputs keep them.
        reject: see `Head.rejection_threshold`; None measures no distances.
        images: how many there are, if known.
        alone: whether statistics of a batch, where the head has no stored ones, are of each image alone.
    """
    if not head.classes:
        raise ZooError(NO_CLASSES)
    precision = pick_precision(precision, head.encoder.architecture, head.device)
    stored = head.stats == "stored"
    if features and not stored:
        raise ZooError(
            "Only stored statistics give an image the same features in any batch: omit features, or set model.stats."
        )
    fast = head.abilities.linear and stored and not keeps_features() and (images is None or images > FEW)
    rejects = bool(reject) and not head.cannot_reject
    runs = TorchHead(head, head.fuse() if fast else head, precision, stored, alone, rejects, features)
    return HeadPredictor(
        head.encoder.architecture,
        head.classnames,
        head.pretrained_cfg,
        encode=runs.encode if stored else np.asarray,
        classify=runs.classify if stored else runs.classify_pixels,
        threshold=head.rejection_threshold(reject) if rejects and reject else None,
        cannot_reject=head.cannot_reject,
        runs=runs,
    )


@dataclass(frozen=True)
class TorchHead:
    """What PyTorch computes of a head: pixels are uint8 (n, 3, H, W), features float32 (n, F)."""

    head: Head
    fused: Head | FusedHead  # or itself
    precision: str
    stored: bool  # whether features do not depend on the batch
    alone: bool
    rejects: bool
    features: bool

    @cached_property
    def mean_and_std(self) -> list[Tensor]:
        """Of the pixels, (3, 1, 1) each, on the device: once for all batches."""
        cfg = self.head.pretrained_cfg
        return [torch.tensor(cfg[name], device=self.head.device)[:, None, None] for name in ("mean", "std")]

    def normalised(self, pixels: np.ndarray) -> Tensor:
        """Images (n, 3, H, W) as `create_transform` returns them, on the device."""
        mean, std = self.mean_and_std
        return (torch.from_numpy(pixels).to(self.head.device) / 255 - mean) / std

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> Tensor:
        """Features of pixels."""
        with autocast(self.head.device, self.precision):
            return self.fused.encode_image(self.normalised(pixels)).float()

    @torch.inference_mode()
    def classify(self, features: Tensor) -> Outputs:
        """The outputs for features on any device, a part of them at a time."""
        parts: list[tuple[np.ndarray, ...]] = []
        for chunk in features.split(FEATURES_AT_A_TIME):
            x = chunk.to(self.head.device)
            found = (self.fused.classify(x), self.fused.distances(x)) if self.rejects else (self.fused.classify(x),)
            parts.append(tuple(part.float().cpu().numpy() for part in found))
        logits, *distances = map(np.concatenate, zip(*parts, strict=True))
        kept = features.float().cpu().numpy() if self.features else None
        return Outputs(logits, distances[0] if self.rejects else None, kept)

    @torch.inference_mode()
    def classify_pixels(self, pixels: np.ndarray) -> Outputs:
        """The outputs for pixels, where they depend on the statistics of a batch."""
        batches = self.normalised(pixels).split(1 if self.alone else len(pixels))
        with autocast(self.head.device, self.precision):
            logits = torch.cat([self.head(batch) for batch in batches]).float().cpu().numpy()
        distances = [self.head.distances(self.encode(image[None])) for image in pixels] if self.rejects else []
        return Outputs(logits, torch.cat(distances).cpu().numpy() if distances else None)

    @torch.no_grad()
    def kept(self, images: Sequence[ImageLike], batch_size: int, progress: Progress) -> tuple[Tensor, Errors]:
        """The features of images, NaN of those that cannot be read, and their errors. What frozen encoders give is kept
        by `per_image`, as in training."""
        reads, errors = self.head.reads, Errors([None] * len(images))
        parts = [self._kept(reading, images, errors, batch_size, progress) for reading in reads]
        return joined(parts, parts_of(reads)), errors

    def _kept(
        self, reading: Reading, images: Sequence[ImageLike], errors: Errors, batch_size: int, progress: Progress
    ) -> Tensor:
        frozen = self.head.frozen
        plain = reading.encoder is frozen and reading.prompts is None
        encode = frozen.read if plain else reading.encode  # all parts, which other heads may read

        def compute(rows: Sequence[int]) -> Iterator[Tensor]:
            batches, left = decoded([images[i] for i in rows], frozen.pretrained_cfg, batch_size), iter(rows)
            known = len(images) - len(rows)
            for pixels, problems in by_image(progress, batches, "image features", len(images), known):
                with autocast(self.head.device, self.precision):
                    x = encode(self.normalised(pixels)).float().cpu()
                for i, (problem, at) in enumerate(zip(problems, left, strict=False)):
                    if problem is not None:
                        errors[at], x[i] = problem, math.nan
                yield x[None]

        if isinstance(reading.encoder, FrozenCLIP) and not plain:  # changed by the method
            return torch.cat(list(compute(range(len(images)))), 1)[0]
        setting = partial(tower_setting, reading.encoder, ALL_PARTS if plain else ONE_READING, self.precision)
        return per_image(images, setting, 1, compute)[0, :, : sum(reading.widths)].float()
