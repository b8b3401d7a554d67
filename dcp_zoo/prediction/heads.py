"""Heads, computed by PyTorch. Features are computed in the precision asked for, and logits in the head's, as a small
difference of features is a large one of logits."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import Outputs, is_rejected
from dcp_zoo.backbone.classes import NO_CLASSES
from dcp_zoo.backbone.clip import FrozenCLIP, joined, parts_of
from dcp_zoo.data.images import ImageLike, Progress, by_image, no_progress
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction import Backend, Errors
from dcp_zoo.tables import REFUSED
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.cache import ALL_PARTS, ONE_READING, keeps_features, per_image, tower_setting
from dcp_zoo.training.device import autocast, pick_device, pick_precision
from dcp_zoo.training.recipes import AUTO
from dcp_zoo.zoo.factory import create_model

FEW = 16  # images, for which fusing a head takes longer than it saves


@fair_threads()
def loaded(name: str, device: str = AUTO, classnames: Sequence[str] | None = None) -> Head:
    """The head of this name, or in this folder, to classify with, on the device."""
    head: Head = create_model(name, True, classnames=classnames)
    return head.eval().to(pick_device(device))


def promised(head: Head) -> float | None:
    """The share of its own images that a head promises to reject at most, where measuring can check it; else None."""
    return None if head.cannot_reject or head.stats != "stored" else REFUSED


class HeadBackend(Backend):
    """A head on its device; inside `kept_features` it computes no features that are kept. ZooError without classes, for
    an unknown precision, for features without stored statistics, or to reject without a threshold.

    Args:
        features: whether the outputs keep them.
        reject: see `Head.rejection_threshold`; None measures no distances.
        alone: whether statistics of a batch, where the head has no stored ones, are of each image alone.
    """

    def __init__(
        self,
        head: Head,
        features: bool = False,
        precision: str = AUTO,
        reject: float | None = None,
        alone: bool = True,
    ) -> None:
        if not head.classes:
            raise ZooError(NO_CLASSES)
        threshold, cfg = head.rejection_threshold(reject) if reject else None, head.pretrained_cfg
        super().__init__(head.encoder.architecture, head.classnames, cfg, threshold)
        self.head, self.features, self.alone = head, features, alone
        self.device, self.stored = head.device, head.stats == "stored"
        self.precision = pick_precision(precision, self.architecture, self.device)
        if features and not self.stored:
            problem = "Only stored statistics give an image the same features in any batch"
            raise ZooError(f"{problem}: omit features, or set model.stats.")
        self.fused: Head | FusedHead = head
        self.left = FEW if head.abilities.linear and self.stored and not keeps_features() else math.inf
        self.mean, self.std = (torch.tensor(cfg[name], device=self.device)[:, None, None] for name in ("mean", "std"))

    @fair_threads()
    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, read: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Pixels, uint8 (n, 3, H, W) -> features (n, F), or those of another function of normalised images; where
        features depend on the batch, these images themselves."""
        self.left -= len(pixels)
        if self.left < 0 and self.fused is self.head:
            self.fused = self.head.fuse()
        images = (torch.from_numpy(pixels).to(self.device) / 255 - self.mean) / self.std
        with autocast(self.device, self.precision):
            return (read or self.fused.encode_image)(images).float() if self.stored else images

    @torch.inference_mode()
    def classify(self, features: Tensor) -> Outputs:
        """What `encode` returns, on any device -> the outputs of n images."""
        x = features.to(self.device)
        if self.stored:
            logits = self.fused.classify(x)
        else:
            with autocast(self.device, self.precision):
                logits = torch.cat([self.head(batch) for batch in x.split(1 if self.alone else len(x))])
                x = torch.cat([self.head.encode_image(image[None]) for image in x]) if self.threshold is not None else x
        values, rejected = logits.float().cpu().numpy(), None
        if self.threshold is not None:
            rejected = is_rejected(values, self.fused.distances(x.float()).cpu().numpy(), self.threshold)
        return Outputs(values, rejected, features.float().cpu().numpy() if self.features else None)

    def batches(
        self, images: Sequence[ImageLike], batch_size: int, progress: Progress = no_progress
    ) -> Iterator[tuple[Errors, Outputs]]:
        if len(images) == 1 or not (keeps_features() and self.stored):  # one image is encoded sooner than looked up
            yield from super().batches(images, batch_size, progress)
            return
        errors: Errors = [None] * len(images)
        features = self._kept(images, errors, batch_size, progress)
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            yield errors[batch], self.classify(features[batch])

    @torch.no_grad()
    def _kept(self, images: Sequence[ImageLike], errors: Errors, batch_size: int, progress: Progress) -> Tensor:
        """The features (n, F) of images, NaN of those that cannot be read, whose `errors` are set. What frozen encoders
        give is kept by `per_image`, as in training."""
        frozen, reads, parts = self.head.frozen, self.head.reads, list[Tensor]()

        def compute(read: Callable[[Tensor], Tensor], rows: Sequence[int]) -> Iterator[Tensor]:
            left, known = iter(rows), len(images) - len(rows)
            batches = self.encoded([images[i] for i in rows], batch_size, partial(self.encode, read=read))
            for problems, found in by_image(progress, batches, "image features", len(images), known):
                sound = [problem is None for problem in problems]
                every = torch.full((len(problems), found.shape[1]), math.nan)
                every[sound] = found[: sum(sound)].cpu()
                for problem, i in zip(problems, left, strict=False):
                    errors[i] = errors[i] or problem
                yield every[None]

        for reading in reads:
            plain = reading.encoder is frozen and reading.prompts is None
            every = partial(compute, frozen.read if plain else reading.encode)  # all parts, which other heads may read
            if isinstance(reading.encoder, FrozenCLIP) and not plain:  # changed by the method
                parts.append(torch.cat(list(every(range(len(images)))), 1)[0])
                continue
            setting = partial(tower_setting, reading.encoder, ALL_PARTS if plain else ONE_READING, self.precision)
            parts.append(per_image(images, setting, 1, every)[0, :, : sum(reading.widths)].float())
        return joined(parts, parts_of(reads))
