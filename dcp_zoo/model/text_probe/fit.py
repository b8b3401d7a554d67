"""Fit a text probe on features of the few-shot images.

a, the scale of the text logits, minimises zero-shot CLIP's cross-entropy (sum) on the training images + (log a)^2 / 2.

Each candidate counts by its evidence, exp(-sum of cross-entropies) of training images that were left out, in four folds
(of many images in one): pseudo Bayesian model averaging (Yao et al., Bayesian Analysis 2018). Where the method was
trained on these images, zero-shot CLIP takes its place there. With one image per class nothing can be left out. Then
only softmax regressions count that start at the text, on all parts or CLIP's backbone alone, and all penalties count
the same, unless text explains the training images badly: for the i-th penalty, exp(10 i max(0, r - 1/4)) with r
zero-shot CLIP's loss in units of a random guess's.

An image belongs to none of the classes if its `in_distribution_score` is below a threshold that 95 % of the images
that were left out would exceed if their scores were normally distributed, for which 20 are enough. `REJECT_RATES` are
the other shares. Images that were added as corrections do not count where 20 others are left out: they are the hard
ones, and would lower the threshold. `like_accepted` says how many would pass if their class, and every second one, was
unknown, `others_accepted` how many of everyday pictures pass. Other rules, and validation images: see
`benchmarks/notes.md`.

Examples of images of no class reject what is much like them: what is nearer to one of them than to the class means, by
a margin that `LIKE_EXAMPLES` of the images that were left out would exceed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.model.classes import Class
from dcp_zoo.model.clip import Linear
from dcp_zoo.model.config import REFUSED
from dcp_zoo.model.text_probe.candidates import ENOUGH, GROUP, LARGE, STRENGTHS, Candidates, Group, all_groups
from dcp_zoo.model.text_probe.estimates import minimum
from dcp_zoo.model.text_probe.probe import PENALTIES, TextProbe

REJECT_RATES = (0.01, 0.02, REFUSED, 0.1, 0.2, 0.3)  # shares of the images of known classes
THRESHOLD_IMAGES = 20  # for a threshold, which rejects one in twenty
LIKE_EXAMPLES = 0.02  # the share of images of known classes that examples of no class may reject
HOPELESS = 20.0  # nats behind the best: by e^-20 less likely
FOLDS = 4  # of more than ENOUGH training images one says as much as four
LeftOut = tuple[Candidates, Tensor, Tensor]  # with features (m, W) and labels (m,) that are not part of it


class Read(NamedTuple):
    """The training images as one reading of a head has them, in float32 on the CPU."""

    features: Tensor  # (V, n, ..), of the images and their mirror images: the reading's parts
    start: Linear | None  # the logits by the first part that the probe starts at, if the encoder reads text
    parts: tuple[int, ...] = ()  # their widths; empty for one part

    @property
    def widths(self) -> tuple[int, ...]:
        return self.parts or self.features.shape[-1:]


def share_above(thresholds: Mapping[str, float], scores: np.ndarray) -> dict[str, float]:
    """The percentage of scores (n,) that are not below each threshold."""
    return {rate: round(100 * float((scores >= threshold).mean()), 1) for rate, threshold in thresholds.items()}


def fit_on_features(
    classes: Sequence[Class],
    labels: Tensor,
    readings: Sequence[Read],
    unseen: Linear | None = None,
    weights: Tensor | None = None,
    typical: Tensor | None = None,
    examples: Tensor | None = None,
) -> tuple[TextProbe, Values]:
    """A text probe for these C classes, and how it was fitted, from labels (n,) of the training images.

    Args:
        classes, labels: of the head, and of the images.
        readings: of the head; of two with text, the first is the method's own, and the probe the mean of both.
        unseen: zero-shot CLIP's logits by the first part of the last reading with text, with which training images are
            left out. Default: those that the probe starts at.
        weights: (n,) of the images' losses, see `Candidates`.
        typical: (n,), which images set the threshold, if enough of them are left out. Default: all.
        examples: (M, F'), of images of no class, the parts of the readings that no method changed one after the other.
            They are of use where there is a threshold. Default: none.
    """
    with_text = [reading for reading in readings if reading.start]
    plain = with_text[-1]
    width = plain.widths[0]
    if len(classes) > 1 and (plain.features[0] - plain.features[0, :1]).abs().max() < 1e-6:
        raise ZooError("All classes have the same image features: check that each class has its own images.")
    others = [reading.features[..., reading.widths[0] if reading.start else 0 :] for reading in readings]
    parts = [width, *(part for reading in readings for part in reading.widths[1 if reading.start else 0 :])]
    views = [torch.cat([reading.features[..., :width], *others], -1) for reading in with_text]
    zero_shot = unseen or plain.start
    assert zero_shot is not None
    task, scale = leaving(views[-1], parts, labels, zero_shot, weights)
    left_out, losses = task.folds()
    groups = left_out[0][0].groups if left_out else task.safe_groups(len(plain.widths))
    fitted = [
        Candidates(x, parts, labels, _times(scale, reading.start), weights, groups)
        for x, reading in zip(views, with_text, strict=True)
        if reading.start
    ]
    evidence = (-losses).softmax(0) if left_out else task.without_evidence(groups)
    probe = TextProbe(classes, [reading.widths for reading in readings], width if len(fitted) > 1 else 0)
    strength = _fill(probe, fitted, evidence)
    probe.text_scale.fill_(scale * strength)
    info: Values = {"text_scale": round(scale, 4), "text_strength": round(strength, 3)}
    if left_out:
        chosen = None if typical is None else torch.cat([typical[out] for out in fold_masks(labels)])
        info |= _set_threshold(probe, left_out, evidence, chosen)
    if "thresholds" in info and examples is not None:
        info["examples"] = _set_examples(probe, left_out, examples)
    if "thresholds" in info and len(classes) > 2:
        like = [_like_scores(probe, half, evidence) for half in task.class_halves(groups)]
        info |= {"like_accepted": share_above(info["thresholds"], np.concatenate(like))} if like else {}
    return probe, info


def _fill(probe: TextProbe, fitted: Sequence[Candidates], evidence: Tensor) -> float:
    """Set what a probe adds to the text, the mean of candidates from each of the logits with text, and what it needs
    for new classes; returns how much of the text it starts at."""
    width, parts = fitted[0].widths[0], math.sqrt(sum(map(len, probe.widths)))
    strengths, linears = zip(*(each.mean(evidence) for each in fitted), strict=True)
    rows, biases = zip(*linears, strict=True)
    first = torch.cat([row[:, :width] for row in rows], 1) / len(rows)
    probe.weight.copy_(torch.cat([first, torch.stack(rows).mean(0)[:, width:]], 1) * parts)
    probe.bias.copy_(torch.stack(biases).mean(0))
    probe.means.copy_(torch.cat([each.means[:, :width] for each in fitted[:-1]] + [fitted[-1].means], 1) / parts)
    regressions = evidence.unflatten(0, (-1, GROUP))[:, : len(PENALTIES)].sum(0).clamp(min=1e-6)
    probe.evidence.copy_(regressions / regressions.sum())
    return strengths[0]


def _times(scale: float, linear: Linear) -> Linear:
    return scale * linear[0], scale * linear[1]


@dataclass(frozen=True)
class Leaving:
    """Features (V, n, W), the parts' widths, labels (n,) and scaled text logits of training images, of which some are
    left out; `weights` (n,) as in `Candidates`."""

    views: Tensor
    widths: Sequence[int]
    labels: Tensor
    text: Linear
    weights: Tensor | None

    @property
    def groups(self) -> list[Group]:
        """Those of candidates that are worth fitting before anything is known of them."""
        groups, rows = all_groups(self.widths), self.views.shape[0] * self.views.shape[1]
        return groups if rows * len(self.text[1]) <= LARGE else [group for group in groups if group[1] == 1]

    @property
    def text_logits(self) -> Tensor:
        """Zero-shot CLIP's scaled logits (n, C)."""
        return F.linear(self.views[0, :, : self.widths[0]], *self.text)

    def without_evidence(self, groups: Sequence[Group]) -> Tensor:
        """The weights of these groups' candidates (K,) if no image can be left out."""
        return without_evidence(F.cross_entropy(self.text_logits, self.labels), len(self.text[1]), len(groups))

    def safe_groups(self, blocks: int) -> list[Group]:
        """Those that may count without evidence: of the first blocks, which read nothing but CLIP alone, with text."""
        return [(block, text) for block, text in self.groups if block < blocks and text > 0]

    def without(self, out: Tensor, groups: Sequence[Group]) -> LeftOut:
        """Candidates without the images that are `out` (n,), and with these."""
        weights = None if self.weights is None else self.weights[~out]
        fitted = Candidates(self.views[:, ~out], self.widths, self.labels[~out], self.text, weights, groups)
        return fitted, self.views[0, out], self.labels[out]

    def folds(self, masks: Sequence[Tensor] | None = None) -> tuple[list[LeftOut], Tensor]:
        """Without the images of each of the masks (n,), by default `fold_masks`, and the losses (K,) of these. Groups
        that are `HOPELESS` after the first are not fitted again."""
        groups, left_out = self.groups, list[LeftOut]()
        losses = torch.zeros(len(groups) * GROUP)
        for out in fold_masks(self.labels) if masks is None else masks:
            fitted, features, labels = self.without(out, groups)
            losses = losses + fitted.losses(features, labels)
            if not left_out:
                best = losses.unflatten(0, (-1, GROUP)).amin(1)
                kept = best < best.min() + HOPELESS
                groups = [group for group, is_kept in zip(groups, kept.tolist(), strict=True) if is_kept]
                fitted, losses = fitted.of(groups), losses[kept.repeat_interleave(GROUP)]
            left_out.append((fitted, features, labels))
        return left_out, losses

    def class_halves(self, groups: Sequence[Group]) -> Iterator[LeftOut]:
        """Without half of the classes; both ways, if images are few."""
        for half in range(1 if len(self.labels) > ENOUGH else 2):
            out = self.labels % 2 == half
            if len(self.labels[~out].unique()) > 1 and out.any():
                yield self.without(out, groups)


def _set_threshold(
    probe: TextProbe, left_out: list[LeftOut], evidence: Tensor, typical: Tensor | None = None
) -> Values:
    """Set the unit of distances and the threshold by the images that were left out, unless they are too few; the
    threshold by the `typical` (m,) of them. Returns what the head's info says of it."""
    if sum(len(labels) for *_, labels in left_out) < THRESHOLD_IMAGES:
        return {}
    logits = torch.cat([candidates.logits(features, evidence) for candidates, features, _ in left_out])
    distances = torch.cat([candidates.distances(features) for candidates, features, _ in left_out])
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


def _set_examples(probe: TextProbe, left_out: list[LeftOut], examples: Tensor) -> int:
    """Set examples (M, F') of images of no class, and their margin by the images that were left out; returns M."""
    pairs = ((each.distances(features), each.to_nearest(features, examples)) for each, features, _ in left_out)
    margins = torch.cat([to_means - to_examples for to_means, to_examples in pairs]) / probe.spread
    probe.margin.copy_(margins.mean() - margins.std() * NormalDist().inv_cdf(LIKE_EXAMPLES))
    probe.examples = examples / math.sqrt(sum(map(len, probe.widths)))
    return len(examples)


def _like_scores(probe: TextProbe, half: LeftOut, evidence: Tensor) -> np.ndarray:
    """The scores (m,) of images whose classes a head would not know that was fitted to the others."""
    candidates, features, _ = half
    logits = candidates.logits(features, evidence)[:, candidates.present]
    return in_distribution_score(logits.numpy(), (candidates.distances(features) / probe.spread).numpy())


def leaving(
    views: Tensor, widths: Sequence[int], labels: Tensor, text: Linear, weights: Tensor | None = None
) -> tuple[Leaving, float]:
    """Training images as `Leaving` has them, from zero-shot CLIP's logits by the first part, and a, their scale."""
    scale = text_scale(F.linear(views[0, :, : widths[0]], *text), labels)
    return Leaving(views, widths, labels, _times(scale, text), weights), scale


def text_scale(logits: Tensor, labels: Tensor) -> float:
    """a: minimises the cross-entropy (sum) of a times logits (n, C) + (log a)^2 / 2."""
    logits = logits.double()

    def loss(log: Tensor) -> Tensor:
        return F.cross_entropy(log.exp() * logits, labels, reduction="sum") + log.square() / 2

    return minimum(loss, logits.new_zeros(()), max_iter=100).exp().item()


def without_evidence(loss: Tensor, classes: int, groups: int) -> Tensor:
    """Weights of the candidates (K,) of so many groups if no image can be left out, by zero-shot CLIP's loss on the
    training images."""
    guess = math.log(max(classes, 2))
    weights = (10 * torch.arange(len(PENALTIES)) * max(0.0, loss.item() / guess - 0.25)).softmax(0)
    return F.pad(weights, (0, len(STRENGTHS))).repeat(groups) / groups


def fold_masks(labels: Tensor) -> list[Tensor]:
    """Which of the training images (n,) each of the `all_folds` leaves out; of more than `ENOUGH` the first alone."""
    return all_folds(labels)[: 1 if len(labels) > ENOUGH else FOLDS]


def all_folds(labels: Tensor) -> list[Tensor]:
    """Masks (n,) of images to leave out: a quarter, or more if no class has four; a class's only image never."""
    counts, position = torch.bincount(labels), within_class(labels)
    number = min(FOLDS, int(counts.max()))
    return [(position % number == fold) & (counts[labels] > 1) for fold in range(number if number > 1 else 0)]


def within_class(labels: Tensor) -> Tensor:
    """The position (n,) of each image among those of its class."""
    position = torch.empty_like(labels)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        position[own] = torch.arange(len(own))
    return position
