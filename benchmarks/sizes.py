"""Classes of different size: a class of two training images beside larger ones, with and without the bias
that a text probe gives to classes of fewer images.

    python benchmarks/sizes.py --data-root DATA      writes results/sizes.csv; resumes when repeated

DATA is as in `sets.py`. A draw has at most `CLASSES` classes of a set, of which one is small, and groups kept
apart as in `told.py`. The larger ones have `LARGE` images, or two thirds of what the set has of a class. The
class "other" has images of all but the small class, as many of each. Measured on at most `OTHERS` images of
each class that are in no group of a training image: the balanced accuracy and the recall of the small class,
in percent, and both as `train` tells them, of images that were left out.
"""

import random
from collections import Counter
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from growing import GrowingTable
from sets import CHOOSING, REPORTING, of_class
from told import MODEL, with_groups
from torch import Tensor
from worth import OTHERS, some

from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Item, Split
from dcp_zoo.features.cache import kept_features
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.probe import stacking
from dcp_zoo.progress import no_progress
from dcp_zoo.training.evaluation import Evaluation, measure
from dcp_zoo.training.run import RunOptions, plan, train_head

RESULTS = Path(__file__).parent / "results" / "sizes.csv"
KEY = ("weights", "set", "others", "draw", "bias")
COLUMNS = (*KEY, "classes", "images", "tested", "balanced", "recall", "told_balanced", "told_recall")
KINDS = ("classes of 40", "one class of 40", "one class of 2")
SMALL = 2
LARGE = 40
CLASSES = 10


def drawn(names: list[str], items: list[Item], kind: str, seed: int) -> tuple[list[str], list[Item], list[Item]]:
    """Class names, the small one first, training images, and others of these classes."""
    rng = random.Random(seed)
    classes = rng.sample(range(len(names)), min(CLASSES, len(names)))
    of_each = [rng.sample(own, len(own)) for own in (of_class(items, label) for label in classes)]
    counts = [SMALL] + [min(LARGE, 2 * len(own) // 3) for own in of_each[1:]]
    if kind != KINDS[0]:
        total = LARGE if kind == KINDS[1] else SMALL
        turns = Counter(1 + i % (len(classes) - 1) for i in range(total))
        counts[1:] = [min(turns[i], counts[i]) for i in range(1, len(classes))]
    train = list[Item]()
    test = list[Item]()
    for label, (own, count) in enumerate(zip(of_each, counts, strict=True)):
        new_label = label if kind == KINDS[0] else min(label, 1)
        own = [item._replace(label=new_label) for item in own]
        train += own[:count]
        test += own[count:][:OTHERS]
    together = {item.group for item in train if item.group}
    test = [item for item in test if item.group not in together]
    return [names[label] for label in classes] if kind == KINDS[0] else [names[classes[0]], "other"], train, test


def recalls(evaluation: Evaluation) -> tuple[float, float]:
    """The balanced accuracy, and the recall of the first class."""
    rows = evaluation.per_class
    return round(mean(row.percent for row in rows), 2), round(rows[0].percent, 2)


def without_bias(logits: Tensor, labels: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros(len(sizes))


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with the sets, see sets.py.")],
    draws: Annotated[int, typer.Option(help="Of each set and kind.")] = 5,
) -> None:
    """Measure every set, kind and draw that the table does not have for the current weights yet."""
    torch.set_num_threads(1)
    table = GrowingTable(RESULTS, COLUMNS, KEY)
    weights = weights_id(MODEL)
    with TemporaryDirectory() as folder, kept_features():
        for name, image_set in (REPORTING | CHOOSING).items():
            cells = list(product(KINDS, range(1, draws + 1), ("without", "with")))
            left = [cell for cell in cells if (weights, name, *cell) not in table]
            if not left:
                continue
            names, train, test = image_set(data_root, Path(folder))
            items = with_groups(some(train + test, len(names), LARGE + OTHERS))
            for kind, draw, bias in left:
                classes, trained, tested = drawn(names, items, kind, draw)
                shown: list[Evaluation] = []
                run = plan(Split("folder", classes, trained), MODEL, "text-probe", seed=draw, device="cpu")
                options = RunOptions(progress=no_progress, show=shown.append)
                with patch.object(stacking, "class_bias", without_bias) if bias == "without" else nullcontext():
                    head, _ = train_head(run, None, options, by_folds=True)
                images = ImageLoader(Photos(tested), FeatureExtractor(head.frozen))
                _, evaluation = measure(head, images, all_modes=False)
                row = (len(classes), len(trained), len(tested), *recalls(evaluation), *recalls(shown[0]))
                table.add([(weights, name, kind, draw, bias, *row)])


if __name__ == "__main__":
    typer.run(main)
