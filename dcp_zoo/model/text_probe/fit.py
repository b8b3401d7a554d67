"""Fit a text probe on features of the few-shot images.

a, the scale of the text logits, minimises zero-shot CLIP's cross-entropy (sum) on the training images + (log a)^2 / 2.

Each candidate counts by its evidence, exp(-sum of cross-entropies) of training images that were left out, in four folds
(of many images in one): pseudo Bayesian model averaging (Yao et al., Bayesian Analysis 2018). Where the method was
trained on these images, zero-shot CLIP takes its place there. With one image per class nothing can be left out. Then
the Gaussians do not count, and all penalties count the same, unless text explains the training images badly: for the
i-th penalty, exp(10 i max(0, r - 1/4)) with r zero-shot CLIP's loss in units of a random guess's.

An image belongs to none of the classes if its `in_distribution_score` is below a threshold that 95 % of the images
that were left out would exceed if their scores were normally distributed, for which 20 are enough. `REJECT_RATES` are
the other shares. Images that were added as corrections do not count where 20 others are left out: they are the hard
ones, and would lower the threshold. `like_accepted` says how many would pass if their class, and every second one, was
unknown, `others_accepted` how many of everyday pictures pass. Other rules, and validation images: see
`benchmarks/notes.md`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.model.classes import Class
from dcp_zoo.model.clip import Linear, join
from dcp_zoo.model.config import REFUSED
from dcp_zoo.model.text_probe.candidates import ENOUGH, STRENGTHS, Candidates
from dcp_zoo.model.text_probe.estimates import minimum
from dcp_zoo.model.text_probe.probe import PENALTIES, TextProbe, nearest

REJECT_RATES = (0.01, 0.02, REFUSED, 0.1, 0.2, 0.3)  # shares of the images of known classes
THRESHOLD_IMAGES = 20  # for a threshold, which rejects one in twenty
FOLDS = 4  # of more than ENOUGH training images one says as much as four
FittedOn = tuple[Tensor, Linear]  # features (V, n, E) of the training images, and logits as a linear function of these
LeftOut = tuple[Candidates, Tensor, Tensor]  # with features (m, E) and labels (m,) that are not part of it


def to_nearest_mean(features: Tensor, metric: Tensor, means: Tensor) -> Tensor:
    """The distance (B,) of features (B, E) to the nearest of the class means (C, E), for M (E, E)."""
    whitening = torch.linalg.matrix_power(metric, 2)
    return nearest(features, whitening, means @ whitening)


def share_above(thresholds: Mapping[str, float], scores: np.ndarray) -> dict[str, float]:
    """The percentage of scores (n,) that are not below each threshold."""
    return {rate: round(100 * float((scores >= threshold).mean()), 1) for rate, threshold in thresholds.items()}


def fit_on_features(
    classes: Sequence[Class],
    labels: Tensor,
    readings: Sequence[FittedOn],
    unseen: FittedOn | None = None,
    weights: Tensor | None = None,
    typical: Tensor | None = None,
) -> tuple[TextProbe, dict[str, object]]:
    """A text probe for these C classes, and how it was fitted, from labels (n,) of the training images.

    Args:
        classes, labels: of the head, and of the images.
        readings: features (V, n, E) of the images and their mirror images, in float32 on the CPU, with the method's
            logits; of two, their mean is read.
        unseen: the same of zero-shot CLIP, which training images are left out with. Default: the only reading.
        weights: (n,) of the images' losses, see `Candidates`.
        typical: (n,), which images set the threshold, if enough of them are left out. Default: all.
    """
    views = readings[0][0]
    if len(classes) > 1 and (views[0] - views[0, :1]).abs().max() < 1e-6:
        raise ZooError("All classes have the same image features: check that each class has its own images.")
    frozen, zero_shot = unseen or readings[0]
    text_logits = F.linear(frozen[0], *zero_shot)
    scale = text_scale(text_logits, labels)
    text = _times(scale, zero_shot)
    left_out = folds(frozen, labels, text, weights)
    if left_out:
        logits = torch.cat([candidates.logits(features) for candidates, features, _ in left_out], 1)
        truth = torch.cat([labels for *_, labels in left_out])
        evidence = (-torch.stack([F.cross_entropy(z, truth, reduction="sum") for z in logits])).softmax(0)
    else:
        evidence = without_evidence(F.cross_entropy(scale * text_logits, labels), len(classes))
    fitted = [Candidates(features, labels, _times(scale, linear), weights) for features, linear in readings]
    probe = TextProbe(classes, views.shape[-1], len(readings))
    weight, bias = join([each.mean(evidence) for each in fitted])
    probe.weight.copy_(weight)
    probe.bias.copy_(bias)
    probe.text_scale.fill_(scale)
    probe.metric.copy_(fitted[-1].metric)
    regressions = evidence[: len(PENALTIES)].clamp(min=1e-6)
    probe.evidence.copy_(regressions / regressions.sum())
    probe.means.copy_(torch.cat([each.means for each in fitted], 1) / math.sqrt(len(fitted)))
    info: Values = {"text_scale": round(scale, 4), "evidence": [round(w, 3) for w in evidence.tolist()]}
    if left_out:
        chosen = None if typical is None else torch.cat([typical[out] for out in fold_masks(labels)])
        info |= _set_threshold(probe, left_out, (evidence[:, None, None] * logits).sum(0), chosen)
    if "thresholds" in info and len(classes) > 2:
        halves = class_halves(frozen, labels, text, weights)
        if like := [_like_scores(probe, half, evidence) for half in halves]:
            info["like_accepted"] = share_above(info["thresholds"], np.concatenate(like))
    return probe, info


def _times(scale: float, linear: Linear) -> Linear:
    return scale * linear[0], scale * linear[1]


def _set_threshold(
    probe: TextProbe, left_out: list[LeftOut], logits: Tensor, typical: Tensor | None
) -> dict[str, object]:
    """Set the unit of distances and the threshold by the images that were left out, of which `logits` (m, C) are,
    unless they are too few; the threshold by the `typical` (m,) of them. Returns what the head's info says of it."""
    labels = torch.cat([labels for *_, labels in left_out])
    if len(labels) < THRESHOLD_IMAGES:
        return {}
    distances = torch.cat([_distances(candidates, features) for candidates, features, _ in left_out])
    if not distances.mean() > 0:
        return {}
    probe.spread.copy_(distances.mean())
    scores = torch.from_numpy(in_distribution_score(logits.numpy(), (distances / probe.spread).numpy()))
    if typical is not None and typical.sum() >= THRESHOLD_IMAGES:
        scores = scores[typical]
    middle, deviation = scores.mean().item(), scores.std().item()
    thresholds = {f"{rate:g}": middle + deviation * NormalDist().inv_cdf(rate) for rate in REJECT_RATES}
    probe.threshold.fill_(thresholds[f"{REFUSED:g}"])
    return {"thresholds": {rate: round(value, 6) for rate, value in thresholds.items()}}


def _distances(candidates: Candidates, features: Tensor) -> Tensor:
    """Distances (m,) of images that were left out to the nearest class mean."""
    return to_nearest_mean(features, candidates.metric, candidates.means[candidates.present])


def class_halves(views: Tensor, labels: Tensor, text: Linear, weights: Tensor | None = None) -> Iterator[LeftOut]:
    """Candidates from half of the classes, with features and labels of the others; both ways, if images are few."""
    for half in range(1 if len(labels) > ENOUGH else 2):
        out = labels % 2 == half
        if len(labels[~out].unique()) > 1 and out.any():
            kept = None if weights is None else weights[~out]
            yield Candidates(views[:, ~out], labels[~out], text, kept), views[0, out], labels[out]


def _like_scores(probe: TextProbe, half: LeftOut, evidence: Tensor) -> np.ndarray:
    """The scores (m,) of images whose classes a head would not know that was fitted to the others."""
    candidates, features, _ = half
    logits = (evidence[:, None, None] * candidates.logits(features)).sum(0)[:, candidates.present]
    return in_distribution_score(logits.numpy(), (_distances(candidates, features) / probe.spread).numpy())


def text_scale(logits: Tensor, labels: Tensor) -> float:
    """a: minimises the cross-entropy (sum) of a times logits (n, C) + (log a)^2 / 2."""
    logits = logits.double()

    def loss(log: Tensor) -> Tensor:
        return F.cross_entropy(log.exp() * logits, labels, reduction="sum") + log.square() / 2

    return minimum(loss, logits.new_zeros(()), max_iter=100).exp().item()


def without_evidence(loss: Tensor, classes: int) -> Tensor:
    """Weights of the candidates (K,) if no image can be left out, by zero-shot CLIP's loss on the training images."""
    guess = math.log(max(classes, 2))
    weights = (10 * torch.arange(len(PENALTIES)) * max(0.0, loss.item() / guess - 0.25)).softmax(0)
    return F.pad(weights, (0, len(STRENGTHS)))


def folds(views: Tensor, labels: Tensor, text: Linear, weights: Tensor | None = None) -> list[LeftOut]:
    """Candidates from three quarters of the training images, or on fewer if no class has four, each with features and
    labels of the others; a class's only image is never left out. Of more than `ENOUGH` images the first alone."""
    found = []
    for out in fold_masks(labels):
        kept = None if weights is None else weights[~out]
        found.append((Candidates(views[:, ~out], labels[~out], text, kept), views[0, out], labels[out]))
    return found


def fold_masks(labels: Tensor) -> list[Tensor]:
    """Of each fold, which images (n,) it leaves out."""
    counts, position = torch.bincount(labels), within_class(labels)
    number = min(FOLDS, int(counts.max()))
    rounds = 0 if number == 1 else 1 if len(labels) > ENOUGH else number
    return [(position % number == fold) & (counts[labels] > 1) for fold in range(rounds)]


def within_class(labels: Tensor) -> Tensor:
    """The position (n,) of each image among those of its class."""
    position = torch.empty_like(labels)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        position[own] = torch.arange(len(own))
    return position
