"""From logits to answers: probabilities, the best classes, whether an image is of none; in NumPy, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dcp_zoo.errors import check_range
from dcp_zoo.fields import Values
from dcp_zoo.tables import NONE

DISTANCE_WEIGHT = 4.0  # of the distance in `in_distribution_score`, beside the entropy in nats
Ranked = list[Values]  # of one image, best first: {"class": name, "probability": from 0 to 1}
# "predictions", the ranked classes; "rejected", if that was asked for. Of an image in a file also "image", its name,
# and "error" in place of the others if it cannot be read; of images answered together "alone", each one's class alone;
# of a run with labels "labelled", whether a person said the answer: the only prediction, with a probability of None
Row = Values


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


class Prediction(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


def best(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[list[Prediction]]:
    """Probabilities (n, C) -> the `top_k` classes of each image, best first, or in their order if equally probable."""
    order = np.argsort(-probabilities, 1, kind="stable")[:, :top_k]
    values = np.take_along_axis(probabilities, order, 1)
    return [
        [Prediction(classnames[i], p) for i, p in zip(*pair, strict=True)]
        for pair in zip(order.tolist(), values.tolist(), strict=True)
    ]


def top_classes(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[Ranked]:
    """`best`, as it is written: rounded."""
    found = best(probabilities, classnames, top_k)
    return [[{"class": name, "probability": round(p, 6)} for name, p in row] for row in found]


def is_rejected(logits: np.ndarray, distances: np.ndarray | None, threshold: float) -> np.ndarray:
    """Whether each of n images (n,) belongs to none of the classes: its `in_distribution_score` is too low."""
    assert distances is not None
    return in_distribution_score(logits, distances) < threshold


class Outputs(NamedTuple):
    """What a classifier computes of n images, in float32."""

    logits: np.ndarray  # (n, C)
    distances: np.ndarray | None = None  # (n,), see `Answering`, of one that can reject
    features: np.ndarray | None = None  # (n, F), normalised, if they are kept


@dataclass(frozen=True)
class Answering:
    """How logits become the rows of a table or of JSON."""

    top_k: int = 5  # classes per image
    threshold: float | None = None  # of `in_distribution_score`; without one nothing is rejected

    def __post_init__(self) -> None:
        check_range("top_k", self.top_k, 1)

    def __call__(self, logits: np.ndarray, classnames: Sequence[str], distances: np.ndarray | None = None) -> list[Row]:
        """Logits (n, C) and `TextProbe.distance` (n,) -> the answers for n images."""
        ranked = top_classes(np.exp(log_softmax(logits)), classnames, self.top_k)
        rows: list[Row] = [{"predictions": classes} for classes in ranked]
        if self.threshold is not None:
            unknown = is_rejected(logits, distances, self.threshold)
            rows = [row | {"rejected": bool(no)} for row, no in zip(rows, unknown, strict=True)]
        return rows


def label(row: Row) -> str:
    """The class of an answer, or `NONE`."""
    return NONE if row.get("rejected") else row["predictions"][0]["class"]


def written(row: Row) -> Row:
    """An answer as tables and --json have it: `class` is what was decided, a class or `NONE`."""
    return row if "error" in row else {"image": row["image"], "class": label(row)} | row


def labelled(row: Row, said: str | None) -> Row:
    """An answer of a run with labels: as it is, or what a person said of the image, a class or `NONE`."""
    if "error" in row:
        return row
    if said is None:
        return row | {"labelled": False}
    rejected = {"rejected": said == NONE} if "rejected" in row else {}
    return row | rejected | {"predictions": [{"class": said, "probability": None}], "labelled": True}


def is_changed(row: Row) -> bool:
    """Whether the image had another class without the other images of its folder."""
    return "alone" in row and row["alone"] != label(row)
