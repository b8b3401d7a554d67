"""From logits to answers: probabilities, the best classes, whether an image is of none; in NumPy, without torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dcp_zoo.fields import Values
from dcp_zoo.tables import NONE

DISTANCE_WEIGHT = 4.0  # of the distance in `in_distribution_score`, beside the entropy in nats
# "predictions", as of `top_classes`; "rejected", if that was asked for. Of an image in a file also "image", its name,
# and "error" alone if it cannot be read; with --together "alone", the class without the other images
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


def top_classes(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[list[Values]]:
    """`best`, as it is written: {"class": name, "probability": from 0 to 1, rounded}."""
    ranked = best(probabilities, classnames, top_k)
    return [[{"class": name, "probability": round(p, 6)} for name, p in row] for row in ranked]


def is_rejected(logits: np.ndarray, distances: np.ndarray | None, threshold: float) -> np.ndarray:
    """Whether each of n images (n,) belongs to none of the classes: its `in_distribution_score` is too low."""
    assert distances is not None
    return in_distribution_score(logits, distances) < threshold


class Outputs(NamedTuple):
    """What a classifier computes of n images, in float32."""

    logits: np.ndarray  # (n, C)
    rejected: np.ndarray | None = None  # (n,), whether each is of none of the classes, if that was asked for
    features: np.ndarray | None = None  # (n, F), normalised, if they are kept

    def of(self, rows: Any) -> "Outputs":
        """Of the images at these positions, as arrays of NumPy take them."""
        return Outputs._make(None if part is None else part[rows] for part in self)

    def among(self, sound: Sequence[bool]) -> "Outputs":
        """Rows for all images: these for the `sound` ones, in order, and NaN, not rejected, for the rest."""
        if all(sound):
            return self
        parts = list[Any](self)
        for i, part in enumerate(self):
            if part is not None:
                parts[i] = np.full((len(sound), *part.shape[1:]), np.nan if part.dtype.kind == "f" else 0, part.dtype)
                parts[i][np.asarray(sound)] = part[: sum(sound)]
        return Outputs._make(parts)

    @classmethod
    def joined(cls, outputs: Sequence["Outputs"]) -> "Outputs":
        """Of the images of several outputs, of which each has the same parts."""
        return cls._make(None if part[0] is None else np.concatenate(part) for part in zip(*outputs, strict=True))

    @property
    def probabilities(self) -> np.ndarray:
        """(n, C)."""
        return np.exp(log_softmax(self.logits))

    def columns(self, classnames: Sequence[str], top_k: int) -> Values:
        """The answers as columns of a table, of the same types in each: see `dcp_zoo.Predictor`."""
        probabilities, n = self.probabilities, len(self.logits)
        order = np.argsort(-probabilities, 1, kind="stable")[:, :top_k]
        values = np.take_along_axis(probabilities, order, 1).astype(np.float32)
        rejected = np.zeros(n, bool) if self.rejected is None else self.rejected
        order[np.isnan(values)], order[rejected, 0] = len(classnames) + 1, len(classnames)
        names, columns = np.array([*classnames, NONE, ""])[order], Values()
        for rank in range(order.shape[1]):
            suffix = f"_{rank + 1}" if rank else ""
            columns |= {f"class{suffix}": names[:, rank], f"probability{suffix}": values[:, rank]}
        return columns | {"rejected": rejected} | ({} if self.features is None else {"features": self.features})

    def rows(self, classnames: Sequence[str], top_k: int) -> list[Row]:
        rows: list[Row] = [{"predictions": row} for row in top_classes(self.probabilities, classnames, top_k)]
        if self.rejected is None:
            return rows
        return [row | {"rejected": no} for row, no in zip(rows, self.rejected.tolist(), strict=True)]


def label(row: Row) -> str:
    """The class of an answer, or `NONE`."""
    return NONE if row.get("rejected") else row["predictions"][0]["class"]


def written(row: Row) -> Row:
    """An answer as tables and --json have it: `class` is what was decided, a class or `NONE`."""
    return row if "error" in row else {"image": row["image"], "class": label(row)} | row


def is_changed(row: Row) -> bool:
    """Whether the image had another class without the other images of its folder."""
    return "alone" in row and row["alone"] != label(row)
