"""What heads promise of images like their training images, beside what other images say: sets of classes,
trusted answers, and the lower end of the accuracy that `train` tells.

    python benchmarks/worth.py --data-root DATA --clip CLIP      writes results/worth.csv; resumes when repeated

DATA is as in `sets.py`. Training images are single photographs, or bursts of four as in `bursts.py`. Groups
are found and kept apart as in `told.py`. The other images are those of the same source's training and test
parts, at most `OTHERS` of a class. All shares are in percent. Coverage and size are of images that are not
refused, the trusted share is of all; the worst class has 20 others or more. CLIP has features of OpenAI's
ViT-B/32, see `real_clip.py`: there, training images and others are all of the test part.
"""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from bursts import variant
from given_features import GivenCLIP, given_table, unit_vectors
from growing import GrowingTable
from many_sets import draw
from real_clip import named_classes
from sets import CHOOSING, REPORTING, of_class
from told import MODEL, with_groups

from dcp_zoo.answers import Outputs, Promises, Thresholds
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Item, Split, load_image
from dcp_zoo.features.cache import kept_features
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.fields import Values
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.progress import no_progress
from dcp_zoo.promises import COVERAGES, WRONG
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation
from dcp_zoo.training.run import RunOptions, Source, plan, train_head

RESULTS = Path(__file__).parent / "results" / "worth.csv"
KEY = ("weights", "set", "images_per_class", "of_a_burst", "draw")
COLUMNS = [*KEY, "classes", "images", "promised_by", "others", "refused", "top1", "told", "told_low"]
COLUMNS += [f"{what}_{100 * asked:g}" for asked in COVERAGES for what in ("coverage", "size", "worst")]
COLUMNS += [f"{what}_{100 * share:g}" for share in WRONG for what in ("trusted", "wrong")]
IMAGES = ((2, 1), (4, 1), (8, 1), (16, 1), (8, 4), (16, 4))  # of a class, and of these in a burst
REAL = "dcp_vitb32"
VECTORS = {
    "Caltech-101, ViT-B/32": "caltech101",
    "SUN397, ViT-B/32": "sun397_named",
    "Food-101, ViT-B/32": "food101_named",
}
TRAINED = 32  # images of a class at most, from which all draws are
GIVEN_IMAGES = (2, 4, 8)  # of a class; some classes have ten
OTHERS = 40
LEAST = 20  # others of a class whose coverage is told


def of_sets(outputs: Outputs, labels: np.ndarray, least: float) -> tuple[float, float, float | None]:
    """The coverage, the mean size of a set, and the coverage of the worst class."""
    like = outputs.promised()
    sets = outputs.sets(least)
    held = np.array([label in each for label, each in zip(labels, sets, strict=True)])[like]
    counts = Counter(labels[like].tolist())
    of_classes = [held[labels[like] == label].mean() for label, count in counts.items() if count >= LEAST]
    worst = 100 * float(min(of_classes)) if of_classes else None
    return 100 * float(held.mean()), float(np.mean([len(each) for each in sets if each])), worst


class Vectors(Source):
    """Features of images of one set that CLIP's ViT-B/32 gave, for those classes whose name it read, too."""

    def __init__(self, folder: Path, name: str) -> None:
        with np.load(folder / f"{name}.npz") as file, np.load(folder / "text_vitb32.npz") as text:
            arrays = dict(file)
            arrays = arrays if "text_vector" in arrays else named_classes(arrays, dict(text))
        self.names = [str(name) for name in arrays["classnames"]]
        self.rows = unit_vectors(arrays["test_vector"])
        self.items = [Item(row, f"{row}", label) for row, label in enumerate(arrays["test_label"].tolist())]
        self.clip = GivenCLIP()
        self.extract = FeatureExtractor(self.clip)
        self.clip.clip.output_dim = self.rows.shape[1]
        texts = unit_vectors(arrays["text_vector"])
        self.clip.given_texts = dict(zip(self.names, texts, strict=True))

    def read(self, items: Sequence[Item], augment: str = "none", again: bool = False) -> ImageLoader:
        rows = self.rows[[item.path for item in items]]
        return ImageLoader.of_features(given_table(items, [[rows]]))


def measured(split: Split, others: list[Item], seed: int, given: Vectors | None = None) -> Values:
    """The row of one head, on photographs or on features that are given."""
    shown: list[Evaluation] = []
    options = RunOptions(progress=no_progress, show=shown.append)
    run = plan(split, REAL if given else MODEL, "text-probe", seed=seed, device="cpu", describes=False)
    head, _ = train_head(run, None, options, given, by_folds=True)
    images = given.read(others) if given else ImageLoader(Photos(others), FeatureExtractor(head.frozen))
    stored = head.promises
    unlike = head.rejection_threshold() if stored else None
    outputs = outputs_of_loader(head, images, EVAL_BATCH, Thresholds(unlike=unlike))
    labels = images.labels.numpy()
    right = outputs.logits.argmax(1) == labels
    told = shown[0].accuracy
    row: Values = {
        "classes": len(split.classnames),
        "images": len(split.train),
        "promised_by": stored.get("images"),
        "others": len(others),
        "refused": 100 * float(np.mean(~outputs.promised())),
        "top1": 100 * float(right.mean()),
        "told": told.percent,
        "told_low": told.interval[0],
    }
    for coverage in stored.get("sets", {}):
        percent = f"{100 * float(coverage):g}"
        least = Promises.of(stored, float(coverage)).included
        assert least is not None
        names = (f"{what}_{percent}" for what in ("coverage", "size", "worst"))
        row |= zip(names, of_sets(outputs, labels, least), strict=True)
    for share, least in stored.get("trusted", {}).items():
        trusted = outputs.trusted(least)
        row[f"trusted_{100 * float(share):g}"] = 100 * float(trusted.mean())
        if trusted.any():
            row[f"wrong_{100 * float(share):g}"] = 100 * float((~right[trusted]).mean())
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}


def in_bursts(items: list[Item], classes: int, size: int, folder: Path, draw: int) -> list[Item]:
    """As many images of each class, as bursts of the first of its photographs."""
    if size == 1:
        return items
    rng = random.Random(draw)
    made = []
    for label in range(classes):
        own = of_class(items, label)
        for item in own[: len(own) // size]:
            photo = load_image(item.path)
            for number in range(size):
                path = folder / f"{len(made)}.jpg"
                variant(photo, rng).save(path, quality="keep")
                made.append(Item(str(path), f"{item.key}, {number}", label))  # `train` finds the groups
    return made


def some(items: list[Item], classes: int, most: int) -> list[Item]:
    """At most so many of each class, drawn once."""
    rng = random.Random(0)
    of_each = [of_class(items, label) for label in range(classes)]
    return [item for own in of_each for item in rng.sample(own, min(most, len(own)))]


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with the sets, see sets.py.")],
    clip: Annotated[Path, typer.Option(help="Folder with features, see real_clip.py.")],
    draws: Annotated[int, typer.Option(help="Of each set and number of images.")] = 5,
    only: Annotated[list[str], typer.Option(help="These sets alone.")] = [],  # noqa: B006
) -> None:
    """Measure every set, number of images and draw that the table does not have for the current weights
    yet."""
    torch.set_num_threads(1)
    table = GrowingTable(RESULTS, COLUMNS, KEY)
    weights = weights_id(MODEL)
    with TemporaryDirectory() as folder, kept_features():
        for name, image_set in (CHOOSING | REPORTING).items():
            cells = [(*images, seed) for seed in range(1, draws + 1) for images in IMAGES]
            left = [cell for cell in cells if (weights, name, *cell) not in table]
            if not left or (only and name not in only):
                continue
            names, train, test = image_set(data_root, Path(folder))
            train = some(train, len(names), TRAINED)
            items = with_groups(train + some(test, len(names), OTHERS))
            pool = names, items[: len(train)], items[len(train) :]
            for images, size, seed in left:
                drawn = draw(pool, images, seed)
                trained = {item.group for item in drawn.train if item.group}
                keys = {item.key for item in drawn.train}
                others = [item for item in items if item.key not in keys and item.group not in trained]
                with TemporaryDirectory() as made:
                    photos = in_bursts(drawn.train, len(names), size, Path(made), seed)
                    row = measured(Split("folder", names, photos), some(others, len(names), OTHERS), seed)
                table.add([dict(zip(KEY, (weights, name, images, size, seed), strict=True)) | row])
    for name, file in VECTORS.items():
        given = Vectors(clip, file)
        for seed, images in product(range(1, draws + 1), GIVEN_IMAGES):
            key = REAL, name, images, 1, seed
            if key in table or (only and name not in only):
                continue
            drawn = draw((given.names, given.items, []), images, seed)
            keys = {item.key for item in drawn.train}
            others = [item for item in given.items if item.key not in keys]
            row = measured(Split(file.removesuffix("_named"), given.names, drawn.train), others, seed, given)
            table.add([dict(zip(KEY, key, strict=True)) | row])


if __name__ == "__main__":
    typer.run(main)
