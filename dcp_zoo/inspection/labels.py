"""What frozen features say about labels: probabilities without the image, suspects, none of the classes, a curve."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.model.text_probe.estimates import NO_SPREAD, class_means, means_of_some, minimum, shared_precision
from dcp_zoo.model.text_probe.fit import FOLDS, within_class
from dcp_zoo.model.text_probe.probe import nearest
from dcp_zoo.training.methods.gda import gaussian_discriminant

SURE, PER_CLASS = 20, 3
IQR = 1.349  # standard deviations between the quartiles of a normal distribution
SHOTS, DRAWS, TESTED = (1, 2, 4, 8, 16), 5, 1000  # of the learning curve; images tested at most


class Point(NamedTuple):
    """A point of a learning curve: images per class, accuracy in percent, and its 95 % interval over random draws."""

    images: int
    accuracy: float
    low: float
    high: float


def gaussian_scores(features: Tensor, labels: Tensor, classes: int, of: Tensor) -> Tensor:
    """Scores (m, C) of features `of` (m, E) by Gaussian classes fitted to others (n, E), in units of their spread."""
    weight, bias = gaussian_discriminant(features, labels, classes)
    weight, bias = weight - weight.mean(0), bias - bias.mean()
    return (of @ weight.T + bias) / (features @ weight.T + bias).std().clamp(min=1e-6)


def out_of_fold(features: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the other images say of each, in four folds: log-probabilities (n, C) of normalised features (n, E) by
    Gaussian classes that were fitted without them, added to CLIP's text logits (n, C), and distances (n,) to the
    nearest class mean, as of `TextProbe.distance`. The only image of a class is judged by the text, at no distance."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fold, scores, distances = torch.empty_like(labels), torch.zeros_like(text), torch.zeros(len(labels))
    fold[order] = within_class(labels[order]) % FOLDS
    fold[torch.bincount(labels)[labels] == 1] = FOLDS  # never left out
    for number in range(FOLDS):
        out = fold == number
        if out.any():
            others, classes = (features[~out], labels[~out]), text.shape[1]
            scores[out] = gaussian_scores(*others, classes, features[out])
            means = means_of_some(*others, classes).float()[torch.bincount(others[1], minlength=classes) > 0]
            distances[out] = to_nearest_mean(features[out], half_whitening(*others), means)
    u, v = fit_weights(text, scores, labels, prior(len(labels) / text.shape[1]))
    return (u * text + v * scores).log_softmax(-1), distances / distances.mean().clamp(min=1e-6)


def to_nearest_mean(features: Tensor, metric: Tensor, means: Tensor) -> Tensor:
    """The distance (B,) of features (B, E) to the nearest of the class means (C, E), in the metric M^2, M (E, E)."""
    whitening = torch.linalg.matrix_power(metric, 2)
    return nearest(features @ whitening, means @ whitening)


def half_whitening(rows: Tensor, labels: Tensor) -> Tensor:
    """M (E, E), symmetric to the last bit: features (n, E), labels (n,)."""
    present, index = labels.unique(return_inverse=True)
    means = class_means(rows, index, len(present))
    if len(rows) < rows.shape[1]:
        m = _of_few(rows.double() - means[index], rows.square().sum().item()).float()
    else:
        values, vectors = torch.linalg.eigh(shared_precision(rows, index, means))
        m = ((vectors * values.clamp(min=0) ** 0.25) @ vectors.T).float()
    centred = rows - rows.mean(0)
    length = (centred @ m).norm()
    return (m + m.T) * (centred.norm() / length / 2) if length > 0 else torch.eye(rows.shape[1])


def _of_few(centred: Tensor, length: float) -> Tensor:
    """P^(1/4) up to a factor, for fewer rows (n, E) than dimensions: only their span differs from the shrinkage."""
    spread, eye = centred.square().sum(), torch.eye(centred.shape[1], dtype=centred.dtype)
    if spread <= NO_SPREAD * length:
        return eye
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    kept = values > NO_SPREAD * spread
    span = centred.T @ (vectors[:, kept] / values[kept].sqrt())
    return eye + (span * ((1 + values[kept] * (len(centred) - 1) / spread) ** -0.25 - 1)) @ span.T


def prior(shots: float) -> tuple[float, float]:
    """Weights of text logits and scaled Gaussian scores that suit so many images per class, with the miniature."""
    return 0.5 / math.sqrt(shots), 1.4 + 0.55 * math.log2(shots)


def fit_weights(text: Tensor, scores: Tensor, labels: Tensor, centre: tuple[float, float]) -> tuple[float, float]:
    """The posterior mode of the weights of text logits and scores (n, C); their logarithms have a normal prior."""
    text, scores = text.double(), scores.double()
    start = text.new_tensor(centre).log()

    def loss(logs: Tensor) -> Tensor:
        u, v = logs.exp()
        return F.cross_entropy(u * text + v * scores, labels, reduction="sum") + (logs - start).square().sum() / 2

    u, v = minimum(loss, start, max_iter=100).exp().tolist()
    return u, v


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


def learning_curve(features: Tensor, text: Tensor, labels: Tensor) -> list[Point]:
    """Accuracy at 1 to 16 images per class, as far as half of the classes have more, on images that were not drawn."""
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
            values[draw] = 100 * hits(features, text, labels, drawn, tested, shots).float().mean().item()
        spread = 2.776 * values.std(ddof=1) / DRAWS**0.5  # Student's t of five draws
        points.append(Point(shots, values.mean(), max(0, values.mean() - spread), min(100, values.mean() + spread)))
    return points


def hits(features: Tensor, text: Tensor, labels: Tensor, fitted: Tensor, tested: Tensor, shots: float) -> Tensor:
    """Which of the images `tested` are classified correctly by a fit where `fitted` (n,), `shots` of each class."""
    u, v = prior(shots)
    scores = gaussian_scores(features[fitted], labels[fitted], text.shape[1], features[tested])
    return (u * text[tested] + v * scores).argmax(1) == labels[tested]
