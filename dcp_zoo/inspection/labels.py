"""What frozen features say about labels: probabilities without the image, suspects, names, a curve."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.probe.candidates import Evidence, TrainingSet, fit_candidates, mean_of
from dcp_zoo.probe.estimates import text_scale
from dcp_zoo.probe.evidence import leave_out_each, without_evidence
from dcp_zoo.probe.fit import ReadingFeatures
from dcp_zoo.probe.folds import folds, within_class

SURE, PER_CLASS = 20, 3
NOTHING = 0.02  # of the evidence: such candidates are not fitted again
IQR = 1.349  # standard deviations between the quartiles of a normal distribution
# of ImageNet's names with ViT-B/32 and four images per class, at most 1 in 100 is below, and of names of other classes
# three in four
KNOWN = 0.7
SHOTS, DRAWS, TESTED = (1, 2, 4, 8, 16), 5, 1000  # of the learning curve; images tested at most


class Point(NamedTuple):
    """A point of a learning curve: images per class, accuracy in percent, and its 95 % interval over random draws."""

    images: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class OutOfFold:
    """What text probes that were fitted without it say of each of n images."""

    log_probabilities: Tensor  # (n, C)
    distances: Tensor  # (n,), to the nearest class mean, 1 on average
    images: TrainingSet
    evidence: Evidence  # for the candidates that are worth fitting

    def answers(self, train: Tensor, test: Tensor, shots: int) -> Tensor:
        """The answers (m,) for the images `test` by a text probe that is fitted to the images `train` (n,), with this
        evidence, or if there is one of each class, without."""
        drawn, x = self.images.of(train), self.images.views[0][test]
        evidence = without_evidence(drawn, len(drawn.widths)) if shots == 1 else self.evidence
        mean = mean_of(fit_candidates(drawn, evidence), evidence, x.shape[1])
        return mean.logits(drawn.text_logits(x), x).argmax(1)


def out_of_fold(given: ReadingFeatures, labels: Tensor) -> OutOfFold:
    """What the other images say of each, in four folds, of features (1, n, ..) and labels (n,). The only image of a
    class is judged by the text, at no distance."""
    assert given.start is not None
    images = TrainingSet(given.features, given.widths, labels, given.start)
    images = replace(images, scale=text_scale(images.text_logits(images.views[0]), labels))
    log_probabilities = images.text_logits(images.views[0]).log_softmax(-1)
    distances = torch.zeros(len(labels))
    parts = folds(labels)
    left_out, evidence = leave_out_each(images, parts)
    for out, fold in zip(parts, left_out, strict=True):
        log_probabilities[out] = fold.logits(evidence).log_softmax(-1)
        distances[out] = fold.distances()
    distances /= distances.mean().clamp(min=1e-6)
    worth = {family: weights for family, weights in evidence.items() if weights.sum() > NOTHING}
    total = sum(weights.sum() for weights in worth.values())
    return OutOfFold(log_probabilities, distances, images, {family: each / total for family, each in worth.items()})


def suspected(log_probabilities: Tensor, labels: Tensor) -> list[int]:
    """The images for which another class is so many times as probable as their label, the most suspicious first:
    `SURE` times, or with many classes, one of which is the more easily like the image, `PER_CLASS` times their number.
    At equal numbers, this order finds more wrong labels than confident learning: see `benchmarks/inspection.py`."""
    doubt = log_probabilities.amax(1) - log_probabilities.gather(1, labels[:, None])[:, 0]
    order = doubt.argsort(descending=True, stable=True)
    return order[doubt[order] > math.log(max(SURE, PER_CLASS * log_probabilities.shape[1]))].tolist()


def of_no_class(log_probabilities: Tensor, distances: Tensor, labels: Tensor) -> list[int]:
    """The images that may show none of the classes, the least like them first: their `in_distribution_score` lies three
    standard deviations, estimated from the quartiles, below the median, or one if their own class has a probability
    below 1 / `SURE`. Chosen on art paintings, cartoons and Tiny ImageNet, see `benchmarks/inspection.py`."""
    scores = torch.from_numpy(in_distribution_score(log_probabilities.numpy(), distances.numpy()))
    low, middle, high = scores.quantile(scores.new_tensor([0.25, 0.5, 0.75]))
    is_doubtful = log_probabilities.gather(1, labels[:, None])[:, 0] < -math.log(SURE)
    odd = (distances > 0) & (scores < middle - torch.where(is_doubtful, 1, 3) * (high - low) / IQR)
    order = scores.argsort(stable=True)
    return order[odd[order]].tolist()


def unknown(text: Tensor, labels: Tensor) -> list[int]:
    """The classes whose name says little about images, by zero-shot logits (n, C) and labels (n,): in less than `KNOWN`
    of all pairs, an image of the class is more like the name than one of another class. By chance it is in half."""
    ranks, found = text.argsort(0).argsort(0).double(), []
    for label in range(text.shape[1]):
        of_class = labels == label
        images, others = int(of_class.sum()), int((~of_class).sum())
        above = ranks[of_class, label].sum().item() - images * (images - 1) / 2
        found += [label] if above < KNOWN * images * others else []
    return found


def learning_curve(judged: OutOfFold) -> list[Point]:
    """Accuracy at 1 to 16 images per class, as far as half of the classes have more, on images that were not drawn."""
    labels = judged.images.labels
    sizes, points = torch.bincount(labels), []
    for shots in SHOTS:
        if 2 * (sizes > shots).sum() <= len(sizes):
            break
        generator, values = torch.Generator().manual_seed(0), np.zeros(DRAWS)
        most = torch.minimum(sizes - 1, torch.tensor(shots)).clamp(min=1)[labels]
        for draw in range(DRAWS):
            order = torch.randperm(len(labels), generator=generator)
            drawn = torch.empty(len(labels), dtype=torch.bool)
            drawn[order] = within_class(labels[order]) < most[order]
            tested = order[~drawn[order]][:TESTED]
            values[draw] = 100 * (judged.answers(drawn, tested, shots) == labels[tested]).float().mean().item()
        spread = 2.776 * values.std(ddof=1) / DRAWS**0.5  # Student's t of five draws
        points.append(Point(shots, values.mean(), max(0, values.mean() - spread), min(100, values.mean() + spread)))
    return points
