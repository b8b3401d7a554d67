"""`dcp-zoo inspect` and `search --to-label` measured: swapped labels, the accuracy to expect, images of none
of the classes, and suggested images.

    python benchmarks/inspection.py --data-root DATA       writes results/inspection.csv; resumes

DATA is as in `sets.py`. Images of none of the classes come from the reporting sets there. Other thresholds
were chosen on training and validation images of Caltech-101 and PACS photographs; how images are suggested,
on Caltech-101's validation images, photographs, sketches and other classes of Tiny ImageNet. Of that only
validation images are read, as the miniature was trained on the others.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from growing import GrowingTable
from sets import REPORTING, of_class, tiny_imagenet
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.towers.open_clip import EMBEDDING
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import Item, Split, load_split
from dcp_zoo.features.extract import plain_reading
from dcp_zoo.features.groups import comparable
from dcp_zoo.inspection.inspection import learning_curve, of_no_class, out_of_fold, suspected
from dcp_zoo.inspection.search import spread
from dcp_zoo.probe import ReadingFeatures, fit_on_features
from dcp_zoo.training.evaluation import top1
from dcp_zoo.zoo.build import plain_clip

RESULTS = Path(__file__).parent / "results" / "inspection.csv"
COLUMNS = ("weights", "measure", "set", "draw", "name", "value")
MODEL = "dcp_mini"
TEMPLATE = "a photo of a {}."
SWAPPED = 0.05
DRAWS = range(1, 11)  # of each set
PAIRED = range(1, 4)  # draws of two sets
PER_CLASS = 8  # training images of a draw
TESTED = 500  # test images
TEST_IMAGES = 800  # at most
TINY = "tiny-imagenet-200"


@dataclass(frozen=True)
class Folder:
    """The classes `labels` of a dataset, or all, with so many training images each."""

    dataset: str
    images: int
    labels: range | None = None


SETS = {  # how many images of each class the draws are from
    "100 kinds of objects": Folder("caltech101", 16),
    "7 classes of art paintings": Folder("pacs_art_painting", 30),
    "7 classes of cartoons": Folder("pacs_cartoon", 30),
    "50 kinds of things": Folder(TINY, 16, range(1, 100, 2)),
}
POOL = 800  # images that suggestions are chosen from
ROUNDS = 5  # of suggestions
LABELS = 10  # suggestions of a round
RANDOM = 3  # random choices to compare with
Measured = Iterator[tuple[str, Any]]


def main(data_root: Annotated[Path, typer.Option(help="Folder with caltech-101, pacs and tiny-imagenet-200.")]) -> None:
    """Measure what the file of results does not have for the current weights yet."""
    table = GrowingTable(RESULTS, COLUMNS, COLUMNS[:4])
    clip = plain_clip(MODEL)
    with TemporaryDirectory() as folder:
        for (name, which), measure in product(SETS.items(), (labels, estimates, suggestions)):
            images = None
            for seed in DRAWS:
                head = weights_id(MODEL), measure.__name__, name, seed
                if head not in table:
                    drawn = replace(which, images=10**6) if measure is suggestions else which
                    images = images or Images(clip, draw(drawn, data_root, Path(folder), 0))
                    table.add((*head, *row) for row in measure(images, seed))
        for name, others in product(*[REPORTING] * 2):
            for seed in PAIRED if name != others else ():
                head = weights_id(MODEL), strangers.__name__, f"{name} with {others}", seed
                if head not in table:
                    pair = [reporting(clip, each, data_root, Path(folder)) for each in (name, others)]
                    table.add((*head, *row) for row in strangers(*pair, seed))


# -------------------------------------------------------------------------------------------------------------- labels


class Images:
    """The images of a set with their features: those that draws are from, and the test images."""

    def __init__(self, clip: FrozenCLIP, split: Split) -> None:
        self.split = replace(split, test=split.test[:TESTED])
        items = [*split.train, *split.test[:TESTED]]
        table = comparable(items, clip, progress_bar)
        parts = table.rows()[0]
        weight, bias = clip.scaled(clip.zero_shot_classifier(split.classnames, TEMPLATE))
        self.text = (weight.detach(), bias.detach())
        self.parts = plain_reading(clip).only(len(table.widths[0])).parts
        self.train = parts[: len(split.train)]
        self.test = parts[len(split.train) :]
        self.labels, self.test_labels = (
            torch.tensor([i.label for i in part]) for part in (split.train, self.split.test)
        )

    def drawn(self, each: int, rng: random.Random) -> list[int]:
        """So many training images of each class."""
        own = [(self.labels == label).nonzero().flatten().tolist() for label in range(len(self.split.classnames))]
        return [i for rows in own for i in rng.sample(rows, each)]

    def read(self, kept: Sequence[int]) -> ReadingFeatures:
        """Some of the training images."""
        return ReadingFeatures(self.train[None, kept], self.text, self.parts)

    def top1(self, kept: list[int], labels: Tensor | None = None, tested: list[int] | None = None) -> float:
        """Accuracy on the test images, or on others `tested`, of the text probe, fitted to these images
        without their mirror images, with these labels of all of them."""
        labels = self.labels if labels is None else labels
        classes = self.split.classnames
        probe, _ = fit_on_features(classes, labels[kept], [self.read(kept)])
        parts, truth = (self.test, self.test_labels) if tested is None else (self.train[tested], self.labels[tested])
        text = F.linear(parts[:, : self.parts[EMBEDDING]], *self.text)
        return top1(probe(text, parts / len(self.parts) ** 0.5, classes), truth)


def draw(folder: Folder, data_root: Path, images: Path, seed: int) -> Split:
    """Training images of one draw, and test images: the dataset's own, or those that are left."""
    rng = random.Random(seed)
    if folder.dataset == TINY:
        names, items = tiny_imagenet(folder.labels, 25, data_root / TINY, images, "val")
        train = test = items
    else:
        split = load_split(folder.dataset, data_root)
        names = split.classnames
        rng.sample(names, len(names))  # the draws of the committed results come after this one
        train = split.train or split.test  # PACS has no parts
        test = split.test
    drawn = [item for label in range(len(names)) for item in _draw(train, label, folder.images, rng)]
    rest = sorted({*test} - {*drawn})
    return Split("folder", names, drawn, [], rng.sample(rest, min(TEST_IMAGES, len(rest))))


def _draw(items: list[Item], label: int, count: int, rng: random.Random) -> list[Item]:
    own = of_class(items, label)
    return rng.sample(own, min(count, len(own)))


def labels(images: Images, seed: int) -> Measured:
    """Suspects among images of which 5 % got another class, and the accuracy with and without them."""
    rng = random.Random(seed)
    classes = len(images.split.classnames)
    rows = images.drawn(PER_CLASS, rng)
    swapped = set(rng.sample(range(len(rows)), round(SWAPPED * len(rows))))
    given = images.labels[rows].clone()
    for i in swapped:
        given[i] = rng.choice([label for label in range(classes) if label != given[i]])
    judged = out_of_fold(images.read(rows), given, torch.arange(len(rows)))
    found = suspected(judged)
    doubt = judged.log_probabilities.amax(1) - judged.of_label
    kinds = {"": found, "twice as many": doubt.argsort(descending=True)[: 2 * len(swapped)].tolist()}
    yield "images", len(rows)
    yield "swapped", len(swapped)
    for kind, suspects in kinds.items():
        hits = swapped & set(map(int, suspects))
        yield f"{kind} suspects".lstrip(), len(suspects)
        yield f"{kind} precision".lstrip(), round(len(hits) / max(1, len(suspects)), 4)
        yield f"{kind} recall".lstrip(), round(len(hits) / len(swapped), 4)
    with_swaps = images.labels.clone()
    with_swaps[rows] = given
    seen = swapped & {*kinds["twice as many"]}
    yield "top1 correct labels", images.top1(rows)
    yield "top1 swapped labels", images.top1(rows, with_swaps)
    yield "top1 without suspects", images.top1([row for i, row in enumerate(rows) if i not in {*found}], with_swaps)
    kept = [row for i, row in enumerate(rows) if i not in seen]
    yield "top1 without those that a person finds among twice as many", images.top1(kept, with_swaps)


def estimates(images: Images, seed: int) -> Measured:
    """The accuracies that `inspect` expects with 1 to 4 images per class, from eight, and those on all
    others."""
    rng = random.Random(seed)
    rows = images.drawn(PER_CLASS, rng)
    others = sorted({*range(len(images.labels))} - {*rows})
    judged = out_of_fold(images.read(rows), images.labels[rows], torch.arange(len(rows)))
    for point in learning_curve(judged):
        drawn = [i for start in range(0, len(rows), PER_CLASS) for i in rows[start : start + point.images]]
        yield f"estimate {point.images}", round(point.accuracy, 2)
        yield f"accuracy {point.images}", images.top1(drawn, None, others)


# ---------------------------------------------------------------------------------------------------------- strangers


@cache
def reporting(clip: FrozenCLIP, name: str, data_root: Path, folder: Path) -> Images:
    """Up to twice `PER_CLASS` images of each class of a reporting set."""
    names, train, test = REPORTING[name](data_root, folder)
    rng = random.Random(0)
    drawn = [item for label in range(len(names)) for item in _draw(train + test, label, 2 * PER_CLASS, rng)]
    return Images(clip, Split("folder", names, drawn))


def strangers(images: Images, others: Images, seed: int) -> Measured:
    """Images of another set among the classes at random, one in twenty: how many of them, and of the set's
    own, are said to show none of the classes."""
    rng = random.Random(seed)
    classes = len(images.split.classnames)
    rows = images.drawn(PER_CLASS, rng)
    planted = rng.sample(range(len(others.labels)), max(2, round(SWAPPED * len(rows))))
    parts = torch.cat([images.train[rows], others.train[planted]])
    labels = torch.cat([images.labels[rows], torch.tensor([rng.randrange(classes) for _ in planted])])
    judged = out_of_fold(ReadingFeatures(parts[None], images.text, images.parts), labels, torch.arange(len(labels)))
    found = of_no_class(judged)
    right = sum(i >= len(rows) for i in found)
    yield "images", len(rows)
    yield "planted", len(planted)
    yield "planted found", right
    yield "others taken for planted", len(found) - right


# --------------------------------------------------------------------------------------------------------- suggestions


def suggestions(images: Images, seed: int) -> Measured:
    """The accuracy after rounds of labels, of which there are none at first: of suggested images, and the
    mean of random choices from the same ones."""
    order = random.Random(seed).sample(range(len(images.labels)), len(images.labels))
    pool = order[:POOL]
    tested = order[POOL : POOL + TESTED]
    found: list[int] = []
    for _ in range(ROUNDS):
        left = [i for i in pool if i not in found]
        found += [left[row] for row in spread(images.train[left], images.train[found], LABELS)]
    others = [images.top1(random.Random(i).sample(pool, len(found)), None, tested) for i in range(RANDOM)]
    yield "top1 suggested", images.top1(found, None, tested)
    yield "top1 random", round(sum(others) / RANDOM, 3)


if __name__ == "__main__":
    typer.run(main)
