"""Classes in a tree: a parent has the probability of all classes below it, and the answer is as specific as is sure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.answers import top_classes
from dcp_zoo.errors import ZooError, as_zoo_error, nearest_hint
from dcp_zoo.files import read_yaml
from dcp_zoo.texts import NOT_SURE, is_reserved

FORM = 'nested names such as {"animal": {"dog": ["beagle", "pug"], "bird": ["owl"]}, "tool": ["saw"]}, in JSON or YAML'


@dataclass(frozen=True)
class Hierarchy:
    """Ranks classes as `top_classes` does, but begins with the most specific node of the tree with a probability of at
    least 1 - `error_rate`: at most this share of the predictions is wrong as far as these are calibrated."""

    paths: dict[str, list[str]]  # of each class in the tree, the names from it to the top
    error_rate: float  # below 0.5

    def __call__(self, probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[list[dict[str, Any]]]:
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
