"""From logits to answers: probabilities, the best classes, whether an image is of none; in NumPy, without torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcp_zoo.errors import ZooError, as_zoo_error, check_range, nearest_hint
from dcp_zoo.fields import Values
from dcp_zoo.files import read_yaml
from dcp_zoo.texts import NONE, NOT_SURE, is_reserved

DISTANCE_WEIGHT = 4.0  # of the distance in `in_distribution_score`, beside the entropy in nats
Ranked = list[Values]  # of one image, best first: {"class": name, "probability": from 0 to 1}
# probabilities (n, C), class names, how many per image -> the ranked classes of each image
Ranking = Callable[[np.ndarray, Sequence[str], int], list[Ranked]]
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


def top_classes(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[Ranked]:
    """Probabilities (n, C) -> the `top_k` classes of each image, best first, or in their order if equally probable."""
    order = np.argsort(-probabilities, 1, kind="stable")[:, :top_k]
    values = np.take_along_axis(probabilities, order, 1)
    return [
        [{"class": classnames[i], "probability": round(p, 6)} for i, p in zip(*pair, strict=True)]
        for pair in zip(order.tolist(), values.tolist(), strict=True)
    ]


class Outputs(NamedTuple):
    """What a classifier computes of n images, in float32."""

    logits: np.ndarray  # (n, C)
    distances: np.ndarray | None = None  # (n,), see `Answering`, of one that can reject
    features: np.ndarray | None = None  # (n, F), normalised, if they are kept


@dataclass(frozen=True)
class Predictor:
    """A classifier that is ready, by PyTorch or ONNX Runtime."""

    architecture: str  # name of its model
    classnames: list[str]
    preprocessing: Values  # timm's, see `dcp_zoo.data.pixels`
    compute: Callable[[np.ndarray], Outputs]  # pixels, uint8 (n, 3, H, W) -> their outputs
    threshold: float | None = None  # images whose in_distribution_score is below it are of no class; None: not known
    cannot_reject: str = "This head has no threshold to reject images."  # why, and what to do


@dataclass(frozen=True)
class Answering:
    """How logits become answers."""

    top_k: int = 5  # classes per image
    threshold: float | None = None  # of `in_distribution_score`; without one nothing is rejected
    rank: Ranking = top_classes

    def __post_init__(self) -> None:
        check_range("top_k", self.top_k, 1)

    def __call__(self, logits: np.ndarray, classnames: Sequence[str], distances: np.ndarray | None = None) -> list[Row]:
        """Logits (n, C) and `TextProbe.distance` (n,) -> the answers for n images."""
        ranked = self.rank(np.exp(log_softmax(logits)), classnames, self.top_k)
        rows: list[Row] = [{"predictions": classes} for classes in ranked]
        if self.threshold is not None:
            unknown = self.rejects(logits, distances)
            rows = [row | {"rejected": bool(no)} for row, no in zip(rows, unknown, strict=True)]
        return rows

    def rejects(self, logits: np.ndarray, distances: np.ndarray | None) -> np.ndarray:
        """Whether each of n images (n,) belongs to none of the classes."""
        assert distances is not None
        assert self.threshold is not None
        return in_distribution_score(logits, distances) < self.threshold


def label(row: Row) -> str:
    """The class of an answer, or `NONE`."""
    return NONE if row.get("rejected") else row["predictions"][0]["class"]


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


FORM = 'nested names such as {"animal": {"dog": ["beagle", "pug"], "bird": ["owl"]}, "tool": ["saw"]}, in JSON or YAML'


@dataclass(frozen=True)
class Hierarchy:
    """Ranks classes as `top_classes` does, but begins with the most specific node of a tree, whose nodes sum up what is
    below, with a probability of at least 1 - `error_rate`: the share of wrong ones, as far as these are calibrated."""

    paths: dict[str, list[str]]  # of each class in the tree, the names from it to the top
    error_rate: float  # below 0.5

    def __call__(self, probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[list[Values]]:
        """Probabilities (n, C) of the classes -> rows of at most C entries; the first is `NOT_SURE` if no node is sure.
        ZooError for a class in the tree that is none of these, or a parent that is one."""
        for name, *parents in self.paths.values():
            if name not in classnames:
                raise ZooError(f"The hierarchy has {name!r}, which is not a class.{nearest_hint(name, classnames)}")
            if both := set(parents).intersection(classnames):
                raise ZooError(f"In the hierarchy, the class {both.pop()!r} is above {name!r}: rename one of them.")
        paths = [self.paths.get(name, [name]) for name in classnames]
        nodes = {node: len(path) - i for path in paths for i, node in enumerate(path)}
        below = np.array([[node in path for path in paths] for node in nodes])
        sums = probabilities @ below.T
        depth = np.where(sums >= 1 - self.error_rate, list(nodes.values()), 0)
        rows = []
        for ranked, found, p in zip(top_classes(probabilities, classnames, top_k), depth, sums, strict=True):
            best = int((found if found.any() else p).argmax())
            name = [*nodes][best] if found.any() else NOT_SURE
            others = [entry for entry in ranked if entry["class"] != name]
            rows.append([{"class": name, "probability": round(float(p[best]), 6)}, *others][: len(ranked)])
        return rows

    def path_to(self, name: str) -> list[str]:
        """The names from the top of the tree to a node."""
        path = next((path for path in self.paths.values() if name in path), [name])
        return [*reversed(path[path.index(name) :])]


def read_hierarchy(file: Path) -> dict[str, list[str]]:
    """The `paths` in a file; ZooError for anything else than `FORM`, a name that is there twice, or an answer's."""
    with as_zoo_error(f"Cannot read the hierarchy {file} ({{}}): write {FORM}."):
        leaves = list(_leaves(read_yaml(file), []))
    paths, nodes = {path[0]: path for path in leaves}, {tuple(path[i:]) for path in leaves for i in range(len(path))}
    names = {name for name, *_ in nodes}
    if len(paths) < len(leaves) or len(names) < len(nodes) or not paths:
        raise ZooError(f"Each name may appear only once in the hierarchy {file}: write {FORM}.")
    if answers := [*filter(is_reserved, names)]:
        raise ZooError(f"The hierarchy {file} has the name {answers[0]!r}, which is reserved: choose another.")
    return paths


def _leaves(tree: object, above: list[str]) -> Iterator[list[str]]:
    if isinstance(tree, dict):
        for name, below in tree.items():
            yield from _leaves(below, [str(name), *above])
    elif isinstance(tree, list):
        for below in tree:
            yield from _leaves(below, above)
    elif tree is not None or above:
        yield above if tree is None else [str(tree), *above]
