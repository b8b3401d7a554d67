"""The images of a folder say something about each other: nearest ones often show the same, and some classes may be
missing.

With the probabilities p_i (C,) of each image alone, the mean W over its `NEAREST` images by their features, and s (C,),
the shares of the classes among the answers:

    z_i  <-  softmax(log p_i + a (W z)_i + b log((1 + C s) / 2)),    s  <-  the mean of z,    from z = p

a = 0.7 log(C) A: how much an image with all its nearest ones in a class leans to it, where
A = sum_i p_i . (W p)_i / sum_i p_i . p_i, at most 1, is how far nearest images agree: near 0 where most are of other
classes, so that each answer stays as it is
b = 2 (1 - e / C)^3 with e = exp(entropy of s), the effective number of classes: near 0 where all are about as frequent

Both are measured in the folder itself; no labelled image is needed. The numbers, and what else was tried, are in
`benchmarks/together.py`.
"""

import numpy as np

NEAREST, ROUNDS = 8, 10
AGREEMENT, SHARES = 0.7, 2.0  # the numbers in a and b


def together(probabilities: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Refine the probabilities (n, C) of images by each other's, with their features (n, E) of length 1; all in
    float32. The images are those of the classes: others would lend their neighbours what they have not."""
    from sklearn.neighbors import NearestNeighbors  # slow to import

    n, classes = probabilities.shape
    if n < 2 or classes < 2:
        return probabilities
    nearest = min(NEAREST, n - 1)
    found = NearestNeighbors(n_neighbors=nearest, algorithm="brute").fit(features)
    average = found.kneighbors_graph().astype(np.float32)  # W, sparse; no image is a neighbour of itself
    average.data /= nearest
    logs = np.log(probabilities.clip(min=1e-9))
    agree = (probabilities * (average @ probabilities)).sum() / np.square(probabilities).sum()
    lean = np.float32(AGREEMENT * np.log(classes) * min(1.0, agree))
    z = probabilities
    for _ in range(ROUNDS):
        shares = z.mean(0)
        effective = np.exp(-(shares * np.log(shares.clip(min=1e-9))).sum())
        weight = np.float32(SHARES * max(0.0, 1 - effective / min(n, classes)) ** 3)
        z = logs + lean * (average @ z) + weight * np.log((1 + classes * shares) / 2)
        z = np.exp(z - z.max(1, keepdims=True))
        z /= z.sum(1, keepdims=True)
    return z
