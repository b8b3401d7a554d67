"""Classify with a head by PyTorch.

Features are computed in the precision asked for, and logits in the head's, as a small difference of
features is a large one of logits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import NO_THRESHOLDS, Outputs, Thresholds
from dcp_zoo.backbone._torch import in_eval_mode
from dcp_zoo.backbone.classes import NO_CLASSES
from dcp_zoo.backbone.inputs import Images
from dcp_zoo.data import Item
from dcp_zoo.data.unreadable import ERRORS, all_named, refuse, unreadable_summary
from dcp_zoo.errors import ZooError, check_choice, check_range, warn
from dcp_zoo.features import AUTO
from dcp_zoo.features.device import autocast, pick_device, pick_precision
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction import Backend
from dcp_zoo.progress import Progress, by_image
from dcp_zoo.rejection import REFUSED
from dcp_zoo.threads import fair_threads
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.resolve import check_head

FEW = 16  # images, for which fusing a head takes longer than it saves
AT_A_TIME = 1000  # images whose features are classified


@fair_threads()
def loaded(name: str, device: str = AUTO, classnames: Sequence[str] | None = None) -> Head:
    """The head of this name, or in this folder, to classify with, on the device."""
    check_head(name)
    head: Head = create_model(name, True, classnames=classnames)
    return head.eval().to(pick_device(device))


@torch.no_grad()
def outputs_of_features(head: Head | FusedHead, features: Tensor, thresholds: Thresholds = NO_THRESHOLDS) -> Outputs:
    """The outputs of a head for the features (n, F) of images, with these, and what the thresholds say of
    them."""
    parts = []
    for part in features.split(AT_A_TIME):
        x = part.to(head.device)
        logits = head.classify(x).float().cpu().numpy()
        distances = head.distances(x.float()).cpu().numpy() if thresholds.exist else None
        parts.append(thresholds.outputs(logits, distances, x.float().cpu().numpy()))
    return Outputs.joined(parts)


@torch.no_grad()
def outputs_of_loader(
    head: Head, images: ImageLoader, batch_size: int, thresholds: Thresholds = NO_THRESHOLDS
) -> Outputs:
    """The outputs of a head for the images of a loader, in order. Without stored statistics they depend
    on the batches, of this size, and have no features."""
    with in_eval_mode(head):
        if head.stats == "stored":
            return outputs_of_features(head, images.table(head.readings).joined, thresholds)
        extract = images.extract
        assert extract is not None
        batches = by_image(extract.progress, images.in_order(batch_size), "test images", len(images))
        return outputs_of_batches(head, (inputs for inputs, _ in batches), extract.precision)


@torch.no_grad()
def outputs_of_batches(head: Head, batches: Iterable[Images], precision: str) -> Outputs:
    """The logits of a head for batches of images, each with its own statistics."""
    logits = []
    for batch in batches:
        with autocast(head.device, precision):
            logits.append(head(batch.to(head.device)).float().cpu().numpy())
    return Outputs(np.concatenate(logits))


class HeadBackend(Backend):
    """A head on its device. ZooError without classes, for an unknown precision, for features or to reject
    without stored statistics, or to reject without a threshold.

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
        self.stored = head.stats == "stored"
        if not head.classes:
            raise ZooError(NO_CLASSES)
        if (features or reject) and not self.stored:
            raise ZooError(
                "Features, and to reject, need stored statistics, as those of batches vary: set model.stats."
            )
        self.architecture = head.encoder.architecture
        self.classnames = head.classnames
        self.preprocessing = head.pretrained_cfg
        self.extract = FeatureExtractor(head.frozen, pick_precision(precision, self.architecture, head.device))
        self.promises = head.promises if self.stored else {}
        unlike = head.rejection_threshold() if self.promises else None
        self.thresholds = Thresholds(head.rejection_threshold(reject) if reject else None, unlike)
        self.head = head
        self.features = features
        self.alone = alone
        self.fused: Head | FusedHead = head
        self.encoded = 0  # images

    @fair_threads()
    @torch.inference_mode()
    def compute(self, pixels: np.ndarray) -> Outputs:
        """Pixels, uint8 (n, 3, H, W) -> the outputs of n images."""
        images = self.extract.normalised(torch.from_numpy(pixels))
        precision = self.extract.precision
        if not self.stored:
            return outputs_of_batches(self.head, images.split(1 if self.alone else len(images)), precision)
        self.encoded += len(pixels)
        if self.encoded > FEW and self.head.abilities.linear and self.fused is self.head:
            self.fused = self.head.fuse()
        with autocast(self.head.device, precision):
            features = self.fused.encode_image(images).float()
        outputs = outputs_of_features(self.fused, features, self.thresholds)
        return outputs if self.features else outputs._replace(features=None)


def outputs_of(
    head: Head,
    items: Sequence[Item],
    batch_size: int,
    precision: str,
    progress: Progress,
    errors: str,
    reject: float | None = None,
    alone: bool = True,
) -> tuple[Outputs, Mapping[int, ZooError]]:
    """The outputs for the images of items, NaN where they cannot be read, with a warning; and why they cannot.
    Inside `kept_features` nothing is computed that is kept. `errors`: see `dcp_zoo.evaluate`; other arguments
    as of `HeadBackend`."""
    check_choice("errors", errors, ERRORS)
    check_range("batch_size", batch_size, 1)
    with in_eval_mode(head), all_named(items):
        backend = HeadBackend(head, False, precision, reject, alone)
        if backend.stored:
            extract = replace(backend.extract, progress=progress, batch_size=batch_size)
            table = extract(Photos(items), head.readings, keep_errors=errors == "keep")
            outputs = outputs_of_features(head, table.joined, backend.thresholds)
            broken = table.errors
        else:
            broken, outputs = backend.outputs([item.path for item in items], batch_size, progress)
            if errors == "raise":
                refuse(items, broken)
    if broken:
        warn(f"{unreadable_summary(items, broken)}. They have no answer, and count in no accuracy.")
    return outputs, broken


def outputs_of_readable(
    head: Head, items: Sequence[Item], batch_size: int, precision: str, progress: Progress, errors: str = "keep"
) -> tuple[Outputs, list[Item]]:
    """The outputs for the images of items that can be read, and these items; statistics are of batches, where the
    head has no stored ones, and images are rejected at the usual rate, where it can. ZooError if none can be
    read."""
    reject = None if head.cannot_reject or head.stats != "stored" else REFUSED
    outputs, broken = outputs_of(head, items, batch_size, precision, progress, errors, reject, alone=False)
    readable = [i for i in range(len(items)) if i not in broken]
    if not readable:
        refuse(items, broken)
    return outputs.of(readable), [items[i] for i in readable]
