"""From logits to answers: probabilities, the most probable classes, and whether an image belongs to none of them. In
NumPy alone, as the server and ONNX Runtime work without torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcp_zoo.texts import NONE

DISTANCE_WEIGHT = 4.0  # of the distance in `in_distribution_score`, beside the entropy in nats
Ranked = list[dict[str, Any]]  # of one image, best first: {"class": name, "probability": from 0 to 1}
# probabilities (n, C), class names, how many per image -> the ranked classes of each image
Ranking = Callable[[np.ndarray, Sequence[str], int], list[Ranked]]
# "predictions", the ranked classes; "rejected", if that was asked for. Of an image in a file also "image", its name,
# and "error" in place of the others if it cannot be read; of images answered together "alone", each one's class alone
Row = dict[str, Any]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (n, C) -> log-probabilities (n, C)."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def in_distribution_score(logits: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Logits (n, C), and distances (n,) as of `TextProbe.distance` -> a score (n,) that is lower for images of none of
    the classes: minus the entropy of the probabilities - `DISTANCE_WEIGHT` distances. A classifier alone is sure of
    things that it has never seen; the distance to what it has seen tells them apart, and the entropy those that are
    much like the classes. Chosen on the sets that `benchmarks/rejection.py` names for choosing."""
    logs = log_softmax(logits)
    return (np.exp(logs) * logs).sum(1) - DISTANCE_WEIGHT * distances


def top_classes(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[Ranked]:
    """Probabilities (n, C) -> the `top_k` classes of each image, best first, or in their order if equally probable."""
    order = np.argsort(-probabilities, 1, kind="stable")[:, :top_k]
    values = np.take_along_axis(probabilities, order, 1)
    return [
        [{"class": classnames[i], "probability": round(p, 6)} for i, p in zip(*pair, strict=True)]
        for pair in zip(order.tolist(), values.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Answering:
    """How logits become answers."""

    top_k: int = 5  # classes per image
    threshold: float | None = None  # of `in_distribution_score`; without one nothing is rejected
    rank: Ranking = top_classes

    def __call__(self, logits: np.ndarray, classnames: Sequence[str], distances: np.ndarray | None = None) -> list[Row]:
        """Logits (n, C) and `TextProbe.distance` (n,) -> the answers for n images."""
        ranked = self.rank(np.exp(log_softmax(logits)), classnames, self.top_k)
        rows: list[Row] = [{"predictions": classes} for classes in ranked]
        if self.threshold is not None:
            assert distances is not None
            unknown = in_distribution_score(logits, distances) < self.threshold
            rows = [row | {"rejected": bool(no)} for row, no in zip(rows, unknown, strict=True)]
        return rows


def label(row: Row) -> str:
    """The class of an answer, or `NONE`."""
    return NONE if row.get("rejected") else row["predictions"][0]["class"]


def is_changed(row: Row) -> bool:
    """Whether the image had another class without the other images of its folder."""
    return "alone" in row and row["alone"] != label(row)
