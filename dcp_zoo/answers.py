"""From logits to answers: probabilities, the best classes, rejection; in NumPy, without torch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.promises import COVERAGES, TRUSTED, images_for_set
from dcp_zoo.tables import NONE, quoted

DISTANCE_WEIGHT = 4.0  # of the distance in `in_distribution_score`, beside the entropy in nats
# "predictions", as of `top_classes`; "rejected" and "set", if these were asked for; "trusted", if the head
# has it. Of an image in a file also "image", its name, and "error" alone if it cannot be read; with
# --together "alone", the class without the other images
Row = Values


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (n, C) -> log-probabilities (n, C)."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def in_distribution_score(logits: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Logits (n, C), and distances (n,) as of `TextProbe.distance` -> a score (n,) that is lower for
    images of none of the classes: minus the entropy of the probabilities - `DISTANCE_WEIGHT` distances. A
    classifier alone is sure of things that it has never seen; the distance to what it has seen tells them
    apart, and the entropy those that are much like the classes. Chosen on the sets that
    `benchmarks/rejection.py` names for choosing."""
    logs = log_softmax(logits)
    return (np.exp(logs) * logs).sum(1) - DISTANCE_WEIGHT * distances


class Prediction(NamedTuple):
    """A class, its probability, and of the most probable class of a head that can tell, whether it is one of
    those of which at most 5 % are wrong."""

    name: str
    probability: float
    trusted: bool | None = None


def most_probable(probabilities: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, C) -> the positions (n, k) of the `top_k` most probable classes and their
    probabilities (n, k), best first, or in the order of the classes if equally probable."""
    positions = np.argsort(-probabilities, 1, kind="stable")[:, :top_k]
    return positions, np.take_along_axis(probabilities, positions, 1)


def best(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[list[Prediction]]:
    """`most_probable` with the names of the classes, for each of n images."""
    positions, values = most_probable(probabilities, top_k)
    ranked = []
    for classes, of_classes in zip(positions.tolist(), values.tolist(), strict=True):
        names = [classnames[i] for i in classes]
        ranked.append([Prediction(*pair) for pair in zip(names, of_classes, strict=True)])
    return ranked


def top_classes(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[list[Values]]:
    """`best`, as it is written: {"class": name, "probability": from 0 to 1, rounded}."""
    ranked = best(probabilities, classnames, top_k)
    return [[{"class": name, "probability": round(p, 6)} for name, p, _ in row] for row in ranked]


class Promises(NamedTuple):
    """From which probability on something is said of an image like those of training; None: it is not."""

    trusted: float | None = None  # the most probable class can be trusted
    included: float | None = None  # a class is in the image's set

    @classmethod
    def of(cls, stored: Mapping[str, Any], sets: float | None = None) -> "Promises":
        """Of what a head stores, {} if nothing. ZooError for `sets` of a coverage that is none of
        `COVERAGES`, or that the head does not promise."""
        trusted = stored.get("trusted", {}).get(f"{TRUSTED:g}")
        if sets is None:
            return cls(trusted)
        check_choice("coverage of sets", sets, COVERAGES)
        if not stored:
            raise ZooError(
                "This head promises no sets: it is older than these, was fitted on too few images, has other "
                "classes or texts than it was fitted on, or has trained prompts or weights. Train a text probe on "
                "20 images or more, at least two of a class: dcp-zoo train."
            )
        included = stored.get("sets", {}).get(f"{sets:g}")
        if included is None:
            raise ZooError(
                f"Sets for {100 * sets:g} % need {images_for_set(sets)} images, or groups, that were left out of "
                f"the fit and are not refused, and this head has {stored.get('images', 0):.0f}: train it on more, "
                "or ask for less."
            )
        return cls(trusted, included)


NO_PROMISES = Promises()


class Thresholds(NamedTuple):
    """Below which `in_distribution_score` an image is rejected, or unlike those of training, so that nothing
    is promised of it; None: that is not asked for, or not known."""

    rejected: float | None = None
    unlike: float | None = None

    @property
    def exist(self) -> bool:
        """Whether there is one, so that distances are needed."""
        return any(threshold is not None for threshold in self)

    def outputs(
        self, logits: np.ndarray, distances: np.ndarray | None = None, features: np.ndarray | None = None
    ) -> "Outputs":
        """The outputs for images with these logits (n, C), and distances (n,), as of `TextProbe.distance`,
        if they `exist`."""
        if distances is None:
            return Outputs(logits, features=features)
        scores = in_distribution_score(logits, distances)
        rejected, unlike = (None if threshold is None else scores < threshold for threshold in self)
        return Outputs(logits, rejected, features, unlike)


NO_THRESHOLDS = Thresholds()


class Outputs(NamedTuple):
    """What a classifier computes of n images, in float32."""

    logits: np.ndarray  # (n, C)
    rejected: np.ndarray | None = None  # (n,), whether each is of none of the classes, if that was asked for
    features: np.ndarray | None = None  # (n, F), normalised, if they are kept
    unlike: np.ndarray | None = None  # (n,), whether nothing is promised of each, of a head with promises

    def of(self, rows: Any) -> "Outputs":
        """Of the images at these positions, as arrays of NumPy take them."""
        return Outputs._make(None if part is None else part[rows] for part in self)

    def among(self, readable: Sequence[bool]) -> "Outputs":
        """Rows for all images: these for the `readable` ones, in order; NaN, not rejected, for the rest."""
        if all(readable):
            return self
        positions = np.flatnonzero(readable)

        def spread(part: np.ndarray | None) -> np.ndarray | None:
            if part is None:
                return None
            missing = np.nan if part.dtype.kind == "f" else False
            rows = np.full((len(readable), *part.shape[1:]), missing, part.dtype)
            rows[positions] = part[: len(positions)]  # a batch may end with black images, see `prediction.stacked`
            return rows

        return Outputs._make(map(spread, self))

    @classmethod
    def joined(cls, outputs: Sequence["Outputs"]) -> "Outputs":
        """Of the images of several outputs: the parts that all of these have."""
        parts = []
        for arrays in zip(*outputs, strict=True):
            is_partial = any(array is None for array in arrays)
            parts.append(None if is_partial else np.concatenate(arrays))
        return cls._make(parts)

    @property
    def probabilities(self) -> np.ndarray:
        """(n, C)."""
        return np.exp(log_softmax(self.logits))

    def promised(self) -> np.ndarray:
        """Whether each image (n,) can be read and is like those of training."""
        left_out = np.isnan(self.logits[:, 0])
        for part in (self.rejected, self.unlike):
            if part is not None:
                left_out = left_out | part
        return ~left_out

    def trusted(self, least: float) -> np.ndarray:
        """Whether each image's (n,) most probable class can be trusted, by `Promises.trusted`."""
        return self.promised() & (self.probabilities.max(1) >= least)

    def sets(self, least: float) -> list[list[int]]:
        """The positions of the classes in each image's set, the most probable first, by
        `Promises.included`; the most probable class is always in it."""
        probabilities = self.probabilities
        sizes = np.maximum(1, (probabilities >= least).sum(1)) * self.promised()
        positions, _ = most_probable(probabilities, max(sizes, default=0))
        return [row[:size].tolist() for row, size in zip(positions, sizes, strict=True)]

    def columns(self, classnames: Sequence[str], top_k: int, promises: Promises = NO_PROMISES) -> Values:
        """The answers as columns of a table, of the same types in each: see `dcp_zoo.Predictor`."""
        positions, probabilities = most_probable(self.probabilities, top_k)
        rejected = np.zeros(len(positions), bool) if self.rejected is None else self.rejected
        names = np.array([*classnames, NONE, ""])
        positions[rejected, 0] = len(classnames)  # NONE
        positions[np.isnan(probabilities)] = len(classnames) + 1  # "": it cannot be read
        columns: Values = {}
        for rank in range(positions.shape[1]):
            suffix = f"_{rank + 1}" if rank else ""
            columns[f"class{suffix}"] = names[positions[:, rank]]
            if not rank and promises.trusted is not None:
                columns["trusted"] = self.trusted(promises.trusted)
            if not rank and promises.included is not None:
                sets = self.sets(promises.included)
                columns["set"] = np.array([listed([classnames[i] for i in each]) for each in sets], str)
            columns[f"probability{suffix}"] = probabilities[:, rank].astype(np.float32)
        columns["rejected"] = rejected
        if self.features is not None:
            columns["features"] = self.features
        return columns

    def rows(self, classnames: Sequence[str], top_k: int, promises: Promises = NO_PROMISES) -> list[Row]:
        """The answers as rows, see `Row`."""
        columns: Values = {"predictions": top_classes(self.probabilities, classnames, top_k)}
        if self.rejected is not None:
            columns["rejected"] = self.rejected.tolist()
        if promises.trusted is not None:
            columns["trusted"] = self.trusted(promises.trusted).tolist()
        if promises.included is not None:
            columns["set"] = [[classnames[i] for i in each] for each in self.sets(promises.included)]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def listed(names: Sequence[str]) -> str:
    """The classes of a set in one cell of a table, as `split_list` reads them."""
    return ", ".join(map(quoted, names))


def label(row: Row) -> str:
    """The class of an answer, or `NONE`."""
    return NONE if row.get("rejected") else row["predictions"][0]["class"]


def written(row: Row) -> Row:
    """An answer as tables and --json have it: `class` is what was decided, a class or `NONE`."""
    if "error" in row:
        return row
    return {"image": row["image"], "class": label(row)} | row


def is_changed(row: Row) -> bool:
    """Whether the image had another class without the other images of its folder."""
    return "alone" in row and row["alone"] != label(row)
