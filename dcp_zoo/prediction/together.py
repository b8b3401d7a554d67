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
from dcp_zoo.progress import Progress, no_progress

NEAREST = 8
ROUNDS = 10
ROWS = 2000  # images that are compared with all others at a time
AGREEMENT = 0.5  # the factor in a
SHARES = 1.0  # the factor in b
# a folder is left as it is with a larger share of the classes, or a lower mean confidence
FEW = 0.7
CONFIDENT = 0.4


def together(probabilities: np.ndarray, features: np.ndarray, progress: Progress = no_progress) -> np.ndarray:
    """Refine the probabilities (n, C) of images by each other's, with their features (n, E) of length 1;
    all in float32. A folder that is left as it is gets back `probabilities` itself. The images are those
    of the classes: any other would mislead its neighbours."""
    n, classes = probabilities.shape
    if n < 2 or classes < 2 or _share_of_classes(probabilities) >= FEW or probabilities.max(1).mean() <= CONFIDENT:
        return probabilities
    average = _average(features, min(NEAREST, n - 1), progress)
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


def refined(outputs: Outputs, chosen: np.ndarray, progress: Progress = no_progress) -> np.ndarray:
    """The probabilities (n, C) of images: of those that are of the classes, `chosen` (n,), refined by
    each other. Those that cannot be read, NaN, stay so."""
    probabilities = outputs.probabilities
    features = outputs.features
    chosen = chosen & ~np.isnan(probabilities[:, 0])
    if features is not None and chosen.any():
        lengths = np.linalg.norm(features[chosen], axis=1, keepdims=True)
        probabilities[chosen] = together(probabilities[chosen], features[chosen] / lengths, progress)
    return probabilities


def _share_of_classes(probabilities: np.ndarray) -> float:
    """e / C for the mean of probabilities (n, C)."""
    shares = probabilities.mean(0)
    return float(np.exp(-(shares * np.log(shares.clip(min=1e-9))).sum()) / min(probabilities.shape))


def _average(features: np.ndarray, nearest: int, progress: Progress) -> Any:
    """W, sparse (n, n): a mean over the `nearest` images of each, found exactly, in O(n^2) time."""
    from scipy.sparse import csr_array
    from sklearn.neighbors import NearestNeighbors  # slow to import

    n = len(features)
    index = NearestNeighbors(algorithm="brute").fit(features)
    neighbours = []
    parts = [np.arange(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]
    for part in progress(parts, "Comparing images, in parts", len(parts)):
        near = index.kneighbors(features[part], nearest + 1, return_distance=False)
        is_other = near != part[:, None]
        is_other[is_other.all(1), -1] = False  # of many copies, an image may not find itself
        neighbours.append(near[is_other])
    weights = np.full(n * nearest, 1 / nearest, np.float32)
    row_ends = np.arange(0, n * nearest + 1, nearest)
    return csr_array((weights, np.concatenate(neighbours), row_ends), (n, n))
