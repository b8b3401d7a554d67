"""From logits to answers: probabilities, the best classes, rejection; in NumPy, without torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.promises import COVERAGES, TRUSTED, images_for_set
from dcp_zoo.tables import NONE, quoted

DISTANCE_WEIGHT = 4.0  # of the distance in `in_distribution_score`, beside the entropy in nats
# An answer as JSON has it: "class", what was decided, or `NONE`; "predictions", the most probable classes, best
# first, each "class" and "probability", from 0 to 1; "rejected" and "set", if these were asked for; "trusted",
# if the head has it. Of an image in a file also "image", its name, and "error" alone if it cannot be read; with
# --together "alone", the class without the other images
Row = Values
# what stands in a column of a table, or of its kind for further classes, where there is no answer; "" in others
BLANKS: Values = {"probability": np.float32(np.nan), "trusted": False, "rejected": False}


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


def best(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[list[Prediction]]:
    """Probabilities (n, C) -> the `top_k` most probable classes of each image, best first, or in the order of
    the classes if equally probable."""
    positions = np.argsort(-probabilities, 1, kind="stable")[:, :top_k]
    values = np.take_along_axis(probabilities, positions, 1)  # a list of all would cost more with many classes
    ranked = []
    for classes, row in zip(positions.tolist(), values.tolist(), strict=True):
        ranked.append([Prediction(classnames[i], p) for i, p in zip(classes, row, strict=True)])
    return ranked


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

    def among(self, readable: np.ndarray) -> "Outputs":
        """Of all images: these of the `readable` ones (n,), in order; NaN, not rejected, for the rest."""
        spread = self.of(np.maximum(readable.cumsum() - 1, 0))
        for part in spread:
            if part is not None:
                part[~readable] = np.nan if part.dtype.kind == "f" else False
        return spread

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
        positions = np.argsort(-probabilities, 1, kind="stable")
        return [row[:size].tolist() for row, size in zip(positions, sizes, strict=True)]

    def rows(self, classnames: Sequence[str], top_k: int, promises: Promises = NO_PROMISES) -> list[Row]:
        """The answers, see `Row`."""
        ranked = best(self.probabilities, classnames, top_k)
        columns: Values = {"class": [row[0].name for row in ranked], "predictions": []}
        for row in ranked:
            columns["predictions"].append([{"class": name, "probability": round(p, 6)} for name, p, _ in row])
        if self.rejected is not None:
            columns["class"] = np.where(self.rejected, NONE, columns["class"]).tolist()
            columns["rejected"] = self.rejected.tolist()
        if promises.trusted is not None:
            columns["trusted"] = self.trusted(promises.trusted).tolist()
        if promises.included is not None:
            columns["set"] = [[classnames[i] for i in each] for each in self.sets(promises.included)]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def cells(row: Row) -> Values:
    """An answer as a table has it, by columns: classes and probabilities by rank; with "rejected" also "best",
    the most probable class, whose probability "probability" is; the classes of a set as `split_list` reads
    them."""
    if "error" in row:
        return row
    best, *others = row["predictions"]
    values = {name: value for name, value in row.items() if name != "predictions"}
    if "set" in row:
        values["set"] = ", ".join(map(quoted, row["set"]))
    if "rejected" in row:
        values["best"] = best["class"]
    values["probability"] = best["probability"]
    for rank, prediction in enumerate(others, 2):
        values[f"class_{rank}"] = prediction["class"]
        values[f"probability_{rank}"] = prediction["probability"]
    return values


def table(rows: Sequence[Values], names: Iterable[str]) -> Values:
    """Columns of these names from `cells`, with the same types for any rows."""
    columns = {}
    for name in names:
        blank = BLANKS.get(name.partition("_")[0], "")
        columns[name] = np.array([row.get(name, blank) for row in rows], type(blank))
    return columns
