"""Fit a text probe on features of the few-shot images.

1. The scale a of the text logits minimises zero-shot CLIP's cross-entropy (sum) on the training images + (log a)^2 / 2.
2. Images are left out in four `folds`, of many images in one, and `candidates` fitted to the others. Where the method
   was trained on these images, zero-shot CLIP takes its place there.
3. Each candidate counts by its `evidence`, its losses on the images that were left out.
4. The probe is the mean of the candidates, fitted to all images. Unless text explains these well, it is too unsure, the
   more so the fewer they are: its logits are multiplied by up to 1 + `SHARPER` (1 + 1 / images per class).
5. The scores of the images that were left out set a `threshold`, if these are 20. Images that were added as corrections
   do not count where 20 others are left out: they are the hard ones, and would lower it. `like_accepted` says how many
   images would pass if their class, and every second one, was unknown, `others_accepted` how many everyday pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.backbone.clip import Linear
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.probe.candidates import ENOUGH, Candidate, Evidence, TrainingSet, fit_candidates, mean_of
from dcp_zoo.probe.estimates import text_scale
from dcp_zoo.probe.evidence import LeftOut, leave_out, leave_out_each, surprise, without_evidence
from dcp_zoo.probe.folds import folds, shares
from dcp_zoo.probe.model import TextProbe, gated
from dcp_zoo.probe.threshold import LIKE_EXAMPLES, THRESHOLD_IMAGES, average, quantile, share_above, thresholds_of
from dcp_zoo.tables import REFUSED

INSIDE = 0.9  # the share of images like those that were left out for which the probe alone answers
WIDTH, CERTAINTY = 0.1, 0.25  # of its gate, see `gated`; all three: see `benchmarks/notes.md`
SHARPER = 0.15  # by which four sets are calibrated best at 1, 4 and 16 images per class, see `benchmarks/notes.md`


class ReadingFeatures(NamedTuple):
    """The training images as one reading of a head has them, in float32 on the CPU."""

    features: Tensor  # (V, n, ..), of the images and their mirror images: the reading's parts
    start: Linear | None  # the logits by the first part that the probe starts at, if the encoder reads text
    parts: tuple[int, ...] = ()  # their widths; empty for one part
    inside: int = 0  # how many of them, the last ones, are from inside an image tower

    @property
    def widths(self) -> tuple[int, ...]:
        return self.parts or self.features.shape[-1:]


def fit_on_features(
    classes: Sequence[str],
    labels: Tensor,
    readings: Sequence[ReadingFeatures],
    unseen: Linear | None = None,
    weights: Tensor | None = None,
    typical: Tensor | None = None,
    examples: Tensor | None = None,
    groups: Tensor | None = None,
) -> tuple[TextProbe, Values]:
    """A text probe for these C classes, and how it was fitted, from labels (n,) of the training images.

    Args:
        classes, labels: of the head, and of the images.
        readings: of the head; of two with text, the first is the method's own, and the probe the mean of both.
        unseen: zero-shot CLIP's logits by the first part of the last reading with text, with which training images are
            left out. Default: those that the probe starts at.
        weights: (n,), how much each image counts. Default: the same.
        typical: (n,), which images set the threshold, if enough of them are left out. Default: all.
        examples: (M, F'), of images of no class, the parts of the readings that no method changed one after the other.
            They are of use where there is a threshold. Default: none.
        groups: (n,), integers: images with the same one are left out together, and count as one. Default: each alone.
    """
    clip = [reading for reading in readings if reading.start][-1]
    if len(classes) > 1 and (clip.features[0] - clip.features[0, :1]).abs().max() < 1e-6:
        raise ZooError("All classes have the same image features: check that each class has its own images.")
    sets = _training_sets(labels, readings, shares(groups, weights))
    plain = sets[-1] if unseen is None else replace(sets[-1], text=unseen)
    scale = text_scale(plain.text_logits(plain.views[0]), labels, plain.weights)
    plain, sets = replace(plain, scale=scale), [replace(each, scale=scale) for each in sets]

    out = folds(labels, groups)
    if len(labels) > ENOUGH:
        out = out[:1]  # says as much as four
    left_out, evidence = leave_out_each(plain, out)
    if not left_out:
        evidence = without_evidence(plain, len(clip.widths) - clip.inside)
    classes_per_image = (plain.counts > 0).sum().item() / plain.count
    sharper = 1 + SHARPER * (1 + classes_per_image) * min(1.0, 20 * surprise(plain))
    evidence = {family: sharper * weights for family, weights in evidence.items()}

    means = [mean_of(fit_candidates(each, evidence), evidence, each.views.shape[-1]) for each in sets]
    probe = TextProbe(classes, [reading.widths for reading in readings], clip.widths[0] if len(sets) > 1 else 0)
    _fill(probe, sets, means)
    probe.text_scale.fill_(scale * means[0].text)
    info: Values = {"text_scale": round(scale, 4), "text_strength": round(means[0].text / sharper, 3)}

    if left_out:
        shares_out, typical_out = (None if each is None else each[torch.cat(out)] for each in (plain.weights, typical))
        info |= _set_threshold(probe, left_out, evidence, shares_out, typical_out, examples)
    if "thresholds" in info and (scores := _scores_of_unknown(probe, plain, evidence)):
        info["like_accepted"] = share_above(info["thresholds"], np.concatenate(scores))
    return probe, info


def _training_sets(labels: Tensor, readings: Sequence[ReadingFeatures], weights: Tensor | None) -> list[TrainingSet]:
    """For each reading with text, its embedding beside all parts that know no text."""
    embeddings, beside, inside = list[tuple[Tensor, Linear]](), list[Tensor](), list[int]()
    for reading in readings:
        first, *further = reading.features.split(reading.widths, -1)
        if reading.start is None:
            beside.append(first)
        else:
            embeddings.append((first, reading.start))
        beside += further
        inside += range(1 + len(beside) - reading.inside, 1 + len(beside))
    widths = [part.shape[-1] for part in (embeddings[0][0], *beside)]
    return [
        TrainingSet(torch.cat([first, *beside], -1), widths, labels, text, weights=weights, inside=inside)
        for first, text in embeddings
    ]


def _fill(probe: TextProbe, sets: Sequence[TrainingSet], means: Sequence[Candidate]) -> None:
    """Let a probe add to the text the mean of these linear functions, one for each of the sets. A head divides the
    parts of its features by the root of their number."""
    width, root = sets[0].widths[0], math.sqrt(sum(map(len, probe.widths)))
    embeddings = torch.cat([mean.weight[:, :width] for mean in means], 1) / len(means)
    beside = torch.stack([mean.weight for mean in means]).mean(0)[:, width:]
    probe.weight.copy_(torch.cat([embeddings, beside], 1) * root)
    probe.bias.copy_(torch.stack([mean.bias for mean in means]).mean(0))
    seen = torch.cat([*(each.means[:, :width] for each in sets[:-1]), sets[-1].means], 1) / root
    probe.means.copy_(seen.half())  # as they are stored


def _set_threshold(
    probe: TextProbe,
    left_out: Sequence[LeftOut],
    evidence: Evidence,
    weights: Tensor | None,
    typical: Tensor | None,
    examples: Tensor | None,
) -> Values:
    """Set the gate, the unit of distances, the threshold, and the examples (M, F') of images of no class, by the images
    that were left out; the threshold by the `typical` (m,) of them, with their weights (m,). Returns the head's info;
    sets nothing if they are too few."""
    distances = torch.cat([each.distances() for each in left_out])
    if len(distances) < THRESHOLD_IMAGES or not distances.mean() > 0:
        return {}
    probe.spread.copy_(average(distances, weights))
    near = quantile(distances / probe.spread, weights, INSIDE)
    probe.gate = torch.tensor([near, near + WIDTH, CERTAINTY])
    scores = torch.from_numpy(np.concatenate([_scores(each, evidence, probe) for each in left_out]))
    if typical is not None and typical.sum() >= THRESHOLD_IMAGES:
        scores, weights = scores[typical], None if weights is None else weights[typical]
    thresholds = thresholds_of(scores, weights)
    probe.threshold.fill_(thresholds[f"{REFUSED:g}"])
    info: Values = {"thresholds": {rate: round(value, 6) for rate, value in thresholds.items()}}
    if examples is None:
        return info
    closer = distances - torch.cat([each.distances(examples) for each in left_out])
    probe.margin.fill_(quantile(closer / probe.spread, None, 1 - LIKE_EXAMPLES))
    probe.examples = examples / math.sqrt(sum(map(len, probe.widths)))
    return info | {"examples": len(examples)}


def _scores_of_unknown(probe: TextProbe, images: TrainingSet, evidence: Evidence) -> list[np.ndarray]:
    """The scores of images whose classes a head does not know, by fits without every second class, and if images are
    few also without the others."""
    scores = []
    for half in [0] if len(images.labels) > ENOUGH else [0, 1]:
        out = images.labels % 2 == half
        if not out.any() or len(images.labels[~out].unique()) < 2:
            continue
        left_out = leave_out(images, out.nonzero().flatten(), evidence)
        scores.append(_scores(left_out, evidence, probe, left_out.kept.counts > 0))
    return scores


def _scores(left_out: LeftOut, evidence: Evidence, probe: TextProbe, known: Tensor | slice = slice(None)) -> np.ndarray:
    """The `in_distribution_score`s (m,) of images that were left out, by a head that has these classes."""
    own, text = (logits[:, known] for logits in left_out.logits(evidence))
    distances = left_out.distances() / probe.spread
    return in_distribution_score(gated(own, text, distances, probe.gate).numpy(), distances.numpy())
