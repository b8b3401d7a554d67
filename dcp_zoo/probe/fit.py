"""Fit a text probe to features of the few-shot images.

1. The text logits z get a scale a, which minimises the cross-entropy (sum) of a z on the training images
   + (log a)^2 / 2.
2. For each of four `folds`, `candidates` are fitted to the images of the other folds, all classes counting
   the same, and applied to the images of the fold. With more than `MANY` images, one fold says enough. A
   method that was trained on all the images has seen those of the fold, too: there the candidates start at
   zero-shot CLIP's logits instead of the method's.
3. Each candidate gets a weight by its losses on the images of the folds, see `stacking`.
4. The probe is the weighted mean of the candidates, now fitted to all images. It is underconfident where the
   text alone explains the images badly, and the more so the fewer they are. So its logits are multiplied by
   an inverse temperature, between 1 and 1 + `SHARPER` (1 + 1 / images per class). Classes with fewer images
   than the largest get a `class_bias`, see `stacking`.
5. If the folds have 20 images or more, the scores of these set a `threshold` to reject images by. Images that
   were added as corrections are left out of it if 20 others remain: they are the hard ones, and would lower
   it. `like_accepted` says how many images would pass if their class, and every second one, was unknown,
   `others_accepted` how many everyday pictures.

What the candidates say of the fold that they have not seen, `TextProbe.held_out`, also gives the accuracy that
`train` tells.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.backbone.clip import WeightAndBias, count_inside
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.probe.candidates import CandidateWeights, Fits, TrainingSet, columns_of, fit_candidates
from dcp_zoo.probe.folds import folds, shares
from dcp_zoo.probe.model import BEYOND, HeldOut, TextProbe, gated
from dcp_zoo.probe.stacking import CrossValidation, cross_validate, misfit_of_text, prior_weights
from dcp_zoo.probe.threshold import LIKE_EXAMPLES, THRESHOLD_IMAGES, average, quantile, share_above, thresholds_of
from dcp_zoo.rejection import REFUSED

MANY = 2_000  # images: of more, one fold says as much as four
TRUSTED = 0.9  # the share of images like the held-out ones for which the probe alone answers
WIDTH = 0.1  # of the gate: the distance over which the text takes over, see `gated`
CERTAINTY = 0.25  # of the gate: w in `gated`; how all three were chosen: see `benchmarks/notes.md`
SHARPER = 0.15  # by which four sets are calibrated best at 1, 4 and 16 images per class, see `benchmarks/notes.md`


class ReadingFeatures(NamedTuple):
    """The training images as one reading of a head has them, in float32 on the CPU."""

    features: Tensor  # (V, n, ..), of the images and their mirror images: the reading's groups of features
    start: WeightAndBias | None  # the logits by the first group that the probe starts at, if the encoder reads text
    parts: Mapping[str, int] = MappingProxyType({})  # as the reading has them; empty for one group

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.parts.values()) or self.features.shape[-1:]


def fit_on_features(
    classes: Sequence[str],
    labels: Tensor,
    readings: Sequence[ReadingFeatures],
    unseen: WeightAndBias | None = None,
    weights: Tensor | None = None,
    typical: Tensor | None = None,
    examples: Tensor | None = None,
    groups: Tensor | None = None,
    describes: bool = True,
    total: int | None = None,
) -> tuple[TextProbe, Values]:
    """A text probe for these C classes, and how it was fitted, from labels (n,) of the training images.

    Args:
        classes, labels: of the head, and of the images.
        readings: of the head; of two with text, the first is the method's own, and the probe the mean of
            both.
        unseen: zero-shot CLIP's logits by the first group of the last reading with text, for candidates that
            are fitted without held-out images. Default: those that the probe starts at.
        weights: (n,), how much each image counts. Default: the same.
        typical: (n,), which images set the threshold, if enough of them are held out. Default: all.
        examples: (M, F'), of images of no class, the groups of the readings that no method changed one after
            the other. They are of use where there is a threshold. Default: none.
        groups: (n,), integers: images with the same one are held out together, and count as one. Default:
            each alone.
        describes: whether to estimate `like_accepted`, by two more fits.
        total: how many images there are with those that are left out, as of all folds but one. Default: n.
    """
    clip = [reading for reading in readings if reading.start][-1]
    if len(classes) > 1 and (clip.features[0] - clip.features[0, :1]).abs().max() < 1e-6:
        raise ZooError("All classes have the same image features: check that each class has its own images.")
    if groups is None:
        groups = torch.arange(len(labels))
    training_sets = _training_sets(labels, readings, shares(groups, weights), total)
    frozen = training_sets[-1]  # what the method has not changed
    if unseen is not None and not all(map(torch.equal, unseen, frozen.text)):
        frozen = replace(frozen, text=unseen)
    scale = frozen.scales(frozen.all)
    folds_out = folds(labels, groups)
    if (total or len(labels)) > MANY:
        folds_out = folds_out[:1]
    validation = cross_validate(frozen, folds_out) if folds_out else None
    stacked = validation.weights if validation else prior_weights(frozen, scale)
    inverse_temperature = _inverse_temperature(frozen, scale)
    sharpened = {configuration: inverse_temperature * each for configuration, each in stacked.items()}

    fits = [fit_candidates(each, each.all, scale, sharpened) for each in training_sets]
    probe = TextProbe(classes, [reading.widths for reading in readings], clip.widths[0] if len(fits) > 1 else 0)
    text_share = _fill(probe, fits, sharpened)
    probe.text_scale.fill_(scale.item() * text_share)
    info: Values = {
        "text_scale": round(scale.item(), 4),
        "text_strength": round(text_share / inverse_temperature, 3),
    }
    if validation:
        logits, text_logits, bias = validation.logits(inverse_temperature)
        probe.bias += bias
        info |= _set_threshold(probe, validation, logits, text_logits, typical, examples)
        if describes and "thresholds" in info:
            scores = _scores_of_unknown(probe, frozen, scale, sharpened, bias)
            if scores:
                info["like_accepted"] = share_above(info["thresholds"], np.concatenate(scores))
    return probe, info


def _inverse_temperature(images: TrainingSet, scale: Tensor) -> float:
    """What the logits are multiplied by, see 4. of the module."""
    classes_per_image = len(images.labels.unique()) / images.weights.sum().item()
    misfit = misfit_of_text(images, scale)
    return 1 + SHARPER * (1 + classes_per_image) * min(1.0, 20 * misfit)


def _training_sets(
    labels: Tensor, readings: Sequence[ReadingFeatures], weights: Tensor, total: int | None
) -> list[TrainingSet]:
    """For each reading with text, of which there are one or two, the features without the embedding of the
    other one. The first of two has nothing but its embedding."""
    widths = [width for reading in readings for width in reading.widths]
    columns = columns_of(widths)
    texts = list[WeightAndBias]()
    embeddings = list[int]()  # which of all groups they are
    intermediate = list[int]()
    end = 0
    for reading in readings:
        first = end
        end += len(reading.widths)
        inside = count_inside(reading.parts)
        intermediate += range(end - inside, end)
        if reading.start:
            texts.append(reading.start)
            embeddings.append(first)
            clip_groups = len(reading.widths) - inside
    assert embeddings in ([0], [0, 1])
    views = torch.cat([reading.features for reading in readings], -1)
    sets = []
    for embedding, text in zip(embeddings, texts, strict=True):
        read = [group for group in range(end) if group == embedding or group not in embeddings]
        last = [read.index(group) for group in intermediate]
        groups = [columns[group] for group in read]
        sets.append(TrainingSet(views, groups, labels, text, weights, last, clip_groups, total))
    return sets


def _fill(probe: TextProbe, fits: Sequence[Fits], weights: CandidateWeights) -> float:
    """Let a probe add to the text the mean over fits to all images of one or two training sets. Returns the
    share of the text logits. A head divides the groups of its features by the root of their number."""
    means = [each.mean(0, weights) for each in fits]
    root = math.sqrt(sum(map(len, probe.widths)))
    probe.weight.copy_(torch.stack([mean.weight for mean in means]).mean(0) * root)
    probe.bias.copy_(torch.stack([mean.bias for mean in means]).mean(0))
    probe.means.copy_((fits[-1].means[0] / root).half())  # as they are stored
    return means[0].text_share


def _set_threshold(
    probe: TextProbe,
    validation: CrossValidation,
    logits: Tensor,
    text_logits: Tensor,
    typical: Tensor | None,
    examples: Tensor | None,
) -> Values:
    """Set what is said of held-out images and, if these are enough, by them the gate, the unit of distances,
    the threshold by those that are `typical` (n,), and the examples (M, F') of images of no class. Returns
    the head's info.
    """
    images = validation.fits.images
    positions = validation.positions
    weights = images.weights[positions]
    distances = validation.distances()
    method_logits = images.text_logits[positions]
    if len(positions) < THRESHOLD_IMAGES or not distances.mean() > 0:
        probe.held_out = HeldOut(positions, logits, method_logits)
        return {}
    probe.spread.copy_(average(distances, weights))
    distances = distances / probe.spread
    near = quantile(distances, weights, TRUSTED)
    probe.gate = torch.tensor([near, near + WIDTH, CERTAINTY])
    logits = gated(logits, text_logits, distances, probe.gate)
    scores = torch.from_numpy(in_distribution_score(logits.numpy(), distances.numpy()))
    counted = torch.ones_like(positions, dtype=torch.bool)
    if typical is not None and typical[positions].sum() >= THRESHOLD_IMAGES:
        counted = typical[positions]
    thresholds = thresholds_of(scores[counted], weights[counted])
    probe.threshold.fill_(thresholds[f"{REFUSED:g}"])
    info: Values = {"thresholds": {rate: round(value, 6) for rate, value in thresholds.items()}}
    closer = torch.zeros_like(distances)  # to an example of no class than to the class means
    if examples is not None:
        closer = distances - validation.distances(examples) / probe.spread
        probe.margin = torch.tensor(margin_of(closer))
        probe.examples = examples / math.sqrt(sum(map(len, probe.widths)))
        info["examples"] = len(examples)
    below = torch.zeros_like(counted)
    like_examples = torch.zeros_like(counted)
    for in_fold in validation.parts:  # each fold by what the others say
        others = counted & ~in_fold
        if others.sum() > 1:
            below |= in_fold & (scores < quantile(scores[others], weights[others], REFUSED))
            like_examples |= in_fold & (closer > margin_of(closer[~in_fold]))
    scores = scores.masked_fill(like_examples, -BEYOND)  # below the threshold that validation images may set
    probe.held_out = HeldOut(positions, logits, method_logits, scores, below | like_examples)
    return info


def margin_of(closer: Tensor) -> float:
    """The margin by which examples of no class reject `LIKE_EXAMPLES` of the known images, by how much closer
    to an example than to the class means some of these are (m,)."""
    return quantile(closer, torch.ones_like(closer), 1 - LIKE_EXAMPLES)


def _scores_of_unknown(
    probe: TextProbe, images: TrainingSet, scale: Tensor, weights: CandidateWeights, bias: Tensor
) -> list[np.ndarray]:
    """The scores of images whose classes a head does not know: by a fit without every second class and, if
    images are not many, one without the others."""
    scores = []
    for half in (0,) if len(images.labels) > MANY else (0, 1):
        known = images.labels % 2 != half
        unknown = (~known).nonzero().flatten()
        if len(unknown) == 0 or len(images.labels[known].unique()) < 2:
            continue
        fits = fit_candidates(images, known[None], scale, weights)
        classes = fits.has_images[0]
        logits, text_logits = fits.logits(0, weights, unknown)
        distances = fits.distances(0, unknown) / probe.spread
        logits = gated((logits + bias)[:, classes], text_logits[:, classes], distances, probe.gate)
        scores.append(in_distribution_score(logits.numpy(), distances.numpy()))
    return scores
