"""Refine the answers for a folder by each other: near images often show the same class, and some classes
are missing.

With the probabilities p_i (C,) of each image alone, the mean W over its `NEAREST` images by their
features, and s (C,), the shares of the classes among the answers:

    z_i  <-  softmax(log p_i + a (W z)_i + b log((1 + C s) / 2)),    s  <-  the mean of z,    from z = p

a = 0.5 log(C) A: how much an image with all its nearest ones in a class leans to it, where A = sum_i p_i
. (W p)_i / sum_i p_i . p_i, at most 1, is how far nearest images agree: near 0 where most are of other
classes, so that each answer stays as it is b = (1 - e / C)^2 with e = exp(entropy of s), the effective
number of classes

A folder is left as it is unless its images, each alone, are taken for few of the classes, e < 0.7 C, and
that with some confidence, a mean of max p_i above 0.4: where many classes are there, neighbours of other
classes do as much harm as good, and where a head is unsure, they agree in what is wrong. C is the number
of images where these are fewer.

All is measured in the folder itself, without labels. What else was tried is in `benchmarks/together.py`.
"""

from typing import Any

import numpy as np

from dcp_zoo.answers import Outputs

NEAREST = 8
ROUNDS = 10
AGREEMENT = 0.5  # the factor in a
SHARES = 1.0  # the factor in b
# a folder is left as it is with a larger share of the classes, or a lower mean confidence
FEW = 0.7
CONFIDENT = 0.4


def together(probabilities: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Refine the probabilities (n, C) of images by each other's, with their features (n, E) of length 1;
    all in float32. A folder that is left as it is gets back `probabilities` itself. The images are those
    of the classes: any other would mislead its neighbours."""
    n, classes = probabilities.shape
    if n < 2 or classes < 2 or _share_of_classes(probabilities) >= FEW or probabilities.max(1).mean() <= CONFIDENT:
        return probabilities
    average = _average(features, min(NEAREST, n - 1))
    logs = np.log(probabilities.clip(min=1e-9))
    agree = (probabilities * (average @ probabilities)).sum() / np.square(probabilities).sum()
    lean = np.float32(AGREEMENT * np.log(classes) * min(1.0, agree))
    z = probabilities
    for _ in range(ROUNDS):
        weight = np.float32(SHARES * max(0.0, 1 - _share_of_classes(z)) ** 2)
        z = logs + lean * (average @ z) + weight * np.log((1 + classes * z.mean(0)) / 2)
        z = np.exp(z - z.max(1, keepdims=True))
        z /= z.sum(1, keepdims=True)
    return z


def refined(outputs: Outputs, chosen: np.ndarray) -> np.ndarray:
    """The probabilities (n, C) of images: of those that are of the classes, `chosen` (n,), refined by
    each other. Those that cannot be read, NaN, stay so."""
    probabilities = outputs.probabilities
    features = outputs.features
    chosen = chosen & ~np.isnan(probabilities[:, 0])
    if features is not None and chosen.any():
        lengths = np.linalg.norm(features[chosen], axis=1, keepdims=True)
        probabilities[chosen] = together(probabilities[chosen], features[chosen] / lengths)
    return probabilities


def _share_of_classes(probabilities: np.ndarray) -> float:
    """e / C for the mean of probabilities (n, C)."""
    shares = probabilities.mean(0)
    return float(np.exp(-(shares * np.log(shares.clip(min=1e-9))).sum()) / min(probabilities.shape))


def _average(features: np.ndarray, nearest: int) -> Any:
    """W, sparse (n, n): a mean over the `nearest` images of each, found exactly, in O(n^2) time."""
    from sklearn.neighbors import NearestNeighbors  # slow to import

    index = NearestNeighbors(n_neighbors=nearest, algorithm="brute").fit(features)
    return index.kneighbors_graph().astype(np.float32) / np.float32(nearest)
