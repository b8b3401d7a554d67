"""The one road from images to logits, by a head, for every door: in batches of pixels, or of a source whose features
may be kept. Features are computed in the precision asked for; what follows is of the head's own, as small differences
of features are large ones of logits."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import Outputs, Predictor
from dcp_zoo.errors import ZooError
from dcp_zoo.model._torch import in_eval_mode
from dcp_zoo.model.classes import NO_CLASSES
from dcp_zoo.model.fused import FusedHead
from dcp_zoo.model.head import Head
from dcp_zoo.model.inputs import Images
from dcp_zoo.training.device import autocast, pick_precision
from dcp_zoo.training.recipes import AUTO
from dcp_zoo.training.sources import ImageSource, Progress, by_image, features_of, no_progress

FEW = 16  # images, for which fusing a head takes longer than it saves
FEATURES_AT_A_TIME = 1000  # that are classified


@torch.no_grad()
def answer(head: Head | FusedHead, features: Tensor, rejects: bool = False, keep: bool = False) -> Outputs:
    """Features (n, F), on any device -> the logits, of a head that `rejects` distances, and the features to `keep`."""
    parts: list[tuple[np.ndarray, ...]] = []
    for chunk in features.split(FEATURES_AT_A_TIME):
        x = chunk.to(head.device)
        found = (head.classify(x), head.distances(x)) if rejects else (head.classify(x),)
        parts.append(tuple(part.float().cpu().numpy() for part in found))
    logits, *distances = map(np.concatenate, zip(*parts, strict=True))
    return Outputs(logits, distances[0] if rejects else None, features.float().cpu().numpy() if keep else None)


@torch.no_grad()
def read(
    head: Head, source: ImageSource, batch_size: int, progress: Progress = no_progress, rejects: bool = False
) -> Outputs:
    """What a head computes of all images of a source, in order, with the current statistics. With other than stored
    ones a batch has `batch_size` images, and there are logits alone."""
    with in_eval_mode(head):
        if head.stats == "stored":
            return answer(head, features_of(head, source, 1, progress)[0], rejects, keep=True)
        batches = by_image(progress, source.batches(batch_size), "test images", len(source.items))
        logits = [_in_precision(head, inputs.to(head.device), source.precision) for inputs, _ in batches]
    return Outputs(torch.cat(logits).float().cpu().numpy())


def _in_precision(head: Head, images: Images, precision: str) -> Tensor:
    with autocast(head.device, precision):
        return head(images)


def torch_predictor(
    head: Head, features: bool = False, precision: str = AUTO, reject: float | None = None, images: int | None = None
) -> Predictor:
    """A head on its device: in batches with stored statistics, otherwise each image alone. `reject`: see
    `Head.rejection_threshold`; None measures no distances. `images`: how many there are, if known. ZooError without
    classes, for an unknown precision, or for features without stored statistics."""
    if not head.classes:
        raise ZooError(NO_CLASSES)
    precision = pick_precision(precision, head.encoder.architecture, head.device)
    alone = head.stats != "stored"  # then each image is a batch
    if features and alone:
        raise ZooError(
            "Only stored statistics give an image the same features in any batch: omit features, or set model.stats."
        )
    pays = images is None or images > FEW
    runs: Head | FusedHead = head.fuse() if head.abilities.linear and pays and not alone else head
    rejects = bool(reject) and not head.cannot_reject
    mean, std = (torch.tensor(head.pretrained_cfg[k], device=head.device)[:, None, None] for k in ("mean", "std"))

    def encode(batch: Tensor) -> Tensor:
        with autocast(head.device, precision):
            return runs.encode_image(batch).float()

    @torch.inference_mode()
    def compute(pixels: np.ndarray) -> Outputs:
        batch = (torch.from_numpy(pixels).to(head.device) / 255 - mean) / std  # as `normalise`, on the device
        if not alone:
            return answer(runs, encode(batch), rejects, features)
        each: Sequence[Tensor] = batch.split(1)
        logits = torch.cat([_in_precision(head, image, precision) for image in each]).float().cpu().numpy()
        distances = torch.cat([head.distances(encode(image)) for image in each]).cpu().numpy() if rejects else None
        return Outputs(logits, distances)

    threshold = head.rejection_threshold(reject) if rejects and reject else None
    return Predictor(
        head.encoder.architecture, head.classnames, head.pretrained_cfg, compute, threshold, head.cannot_reject
    )
