"""A classifier that is corrected in rounds: which images to look at next?

    python benchmarks/together.py features DATA FEATURES    features of the miniature, kept in a folder
    python benchmarks/rounds.py CLIP FEATURES               writes results/rounds.csv; resumes

DATA and CLIP: see `together.py`. A text probe is fitted to one labelled image per class; then, five times, 20 other
images get their true label, and it is fitted again. They are random ones, those about which the probe is least certain
(the lowest probability of its answer), or those that `dcp-zoo search --to-label` finds. Test images are others.
Nothing is chosen by these results.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from sets import REPORTING
from together import MINI, RESULTS, Set, miniature, real_clip
from torch import Tensor
from torch.nn import functional as F
from tuning import GrowingTable

from dcp_zoo.inspection.find import spread
from dcp_zoo.model.classes import Class
from dcp_zoo.model.text_probe import ReadingFeatures, fit_on_features
from dcp_zoo.training.evaluation import top1

COLUMNS = ("set", "seed", "choice", "round", "labelled", "top1")
SEEDS, ROUNDS, LABELS = range(1, 6), 5, 20
CLIP_SETS = ("oxford_flowers", "caltech101")  # without texts


class Round(NamedTuple):
    """What a choice may look at: features (n, E) of the images without a label, those of labelled ones (m, E), and the
    probabilities (n, C) of the probe."""

    left: Tensor
    labelled: Tensor
    p: Tensor
    rng: random.Random


CHOICES: dict[str, Callable[[Round], list[int]]] = {
    "random": lambda now: now.rng.sample(range(len(now.left)), LABELS),
    "least certain": lambda now: now.p.amax(1).argsort()[:LABELS].tolist(),
    "suggest": lambda now: spread(now.left, now.labelled, LABELS),
}


def main(clip: Path, kept: Path) -> None:
    """Measure what the table does not have yet."""
    table = GrowingTable(RESULTS / "rounds.csv", COLUMNS, COLUMNS[:3])
    sets = {f"{MINI}{name}": miniature(name, kept) for name in REPORTING}
    sets |= {name: real_clip(name, clip) for name in CLIP_SETS}
    for name, data in sets.items():
        for seed in SEEDS:
            for choice in CHOICES:
                if (name, seed, choice) not in table:
                    table.add((name, seed, choice, *row) for row in rounds(data, seed, CHOICES[choice]))


def rounds(data: Set, seed: int, choose: Callable[[Round], list[int]]) -> list[tuple[int, int, float]]:
    """The number of each round, labelled images, and accuracy."""
    rng, names = random.Random(seed), [Class(str(i)) for i in range(len(data.text[0]))]
    of_each = [(data.train_labels == label).nonzero().flatten().tolist() for label in range(len(names))]
    found, rows = [rng.choice(own) for own in of_each], []
    for number in range(ROUNDS + 1):
        probe, _ = fit_on_features(
            names, data.train_labels[found], [ReadingFeatures(data.train[None, found], data.text)]
        )
        linear = probe.linear(data.text, names)
        rows.append((number, len(found), top1(F.linear(data.test, *linear), data.labels)))
        known = set(found)
        left = [i for i in range(len(data.train)) if i not in known]
        p = F.linear(data.train[left], *linear).softmax(1)
        found += [left[row] for row in choose(Round(data.train[left], data.train[found], p, rng))]
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
