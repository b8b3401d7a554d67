"""Photographs in bursts: groups that are found, images of the classes that heads refuse, and the accuracy
that is told.

    python benchmarks/bursts.py --data-root DATA            writes results/bursts.csv: the sets for choosing
    python benchmarks/bursts.py --data-root DATA --report   the sets for reporting

DATA is as in `sets.py`; at most ten classes of a set. A burst is made of one photograph: each image of it is
turned by up to 3 degrees, cropped to 90 to 100 % of its sides, with another exposure and contrast (up to 15
%), and saved again as JPEG. What is told is compared with what 40 other photographs of each class say, or as
many as there are.
"""

import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from growing import GrowingTable
from PIL import Image, ImageEnhance
from sets import CHOOSING, REPORTING, SETS, of_class
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.towers.open_clip import EMBEDDING
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Item, load_image
from dcp_zoo.data.groups import find_groups, group_ids
from dcp_zoo.data.images import ImageLike, load_with_facts
from dcp_zoo.features.cache import users_cache
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.photos import Photos
from dcp_zoo.probe import ReadingFeatures, TextProbe, fit_on_features
from dcp_zoo.probe.folds import folds
from dcp_zoo.training.evaluation import Evaluation
from dcp_zoo.zoo.build import plain_clip

RESULTS = Path(__file__).parent / "results" / "bursts.csv"
COLUMNS = ("weights", "set", "images", "draw", "name", "value")
MODEL = "dcp_mini"
CLASSES = 10
TESTED = 40
DRAWS = range(1, 3)
SIDE = 0.9
TURN = 3.0
LIGHT = 0.15
PATTERNS = {  # bursts of each class, and images of each burst
    "16 photographs": [1] * 16,
    "8 photographs": [1] * 8,
    "4 bursts of 4": [4] * 4,
    "8 bursts of 2": [2] * 8,
    "1 burst of 16, 7 photographs": [16, *[1] * 7],
}


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with the data sets.")],
    report: Annotated[bool, typer.Option(help="The sets for reporting.")] = False,
    only: Annotated[list[str], typer.Option(help="These sets alone.")] = [],  # noqa: B006
) -> None:
    """Measure what the file of results does not have for the current weights yet."""
    table = GrowingTable(RESULTS, COLUMNS, COLUMNS[:4])
    clip = plain_clip(MODEL)
    weights = weights_id(MODEL)
    for name in only or (REPORTING if report else CHOOSING):
        with TemporaryDirectory() as folder:
            classes, train, test = SETS[name](data_root, Path(folder))
            labels = sorted(random.Random(0).sample(range(len(classes)), min(CLASSES, len(classes))))
            for draw in DRAWS:
                for pattern, sizes in PATTERNS.items():
                    if (weights, name, pattern, draw) not in table:
                        drawn = Drawn.of(clip, classes, labels, train, test, sizes, draw)
                        table.add((weights, name, pattern, draw, *row) for row in drawn.measured(draw))


def variant(image: Image.Image, rng: random.Random) -> Image.Image:
    """Another image of the burst."""
    angle = rng.uniform(-TURN, TURN)
    (w, h) = image.size
    lost = abs(math.sin(math.radians(angle)))
    side = rng.uniform(SIDE, 1)
    width = min(side * w, w - lost * h)
    height = min(side * h, h - lost * w)
    left = rng.uniform(lost * h / 2, w - width - lost * h / 2)
    top = rng.uniform(lost * w / 2, h - height - lost * w / 2)
    box = max(0, round(left)), max(0, round(top)), min(w, round(left + width)), min(h, round(top + height))
    turned = image.rotate(angle, Image.Resampling.BICUBIC).crop(box)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        turned = change(turned).enhance(1 + rng.uniform(-LIGHT, LIGHT))
    file = io.BytesIO()
    turned.save(file, "JPEG", quality=rng.randint(60, 95))
    return Image.open(file)


def read(clip: FrozenCLIP, images: Sequence[ImageLike]) -> Tensor:
    """All that the image tower says of images (n, W); of files, it is kept."""
    items = [Item(image, str(i), 0) for i, image in enumerate(images)]
    are_files = bool(images) and isinstance(images[0], str)
    with users_cache() if are_files else nullcontext():
        return FeatureExtractor(clip)(Photos(items)).rows()[0]


@dataclass
class Drawn:
    """Training images of one draw, with their mirror images, and other photographs."""

    classes: list[str]
    text: tuple[Tensor, Tensor]
    parts: Mapping[str, int]
    views: Tensor  # (2, n, W)
    facts: np.ndarray
    labels: Tensor
    made: Tensor  # the groups that were made (n,)
    test: Tensor
    test_labels: Tensor

    @staticmethod
    def of(
        clip: FrozenCLIP,
        classes: Sequence[str],
        labels: Sequence[int],
        train: list[Item],
        test: list[Item],
        sizes: Sequence[int],
        draw: int,
    ) -> "Drawn":
        rng = random.Random(draw)
        images = list[Image.Image]()
        made = list[int]()
        of = list[int]()
        shown = list[str]()
        truth = list[int]()
        for label, original in enumerate(labels):
            own = of_class(train, original)
            others = of_class(test, original)
            for size, item in zip(sizes, rng.sample(own, min(len(sizes), len(own))), strict=False):
                photo = load_image(item.path)
                images += [variant(photo, rng) for _ in range(size)] if size > 1 else [photo]
                made += [len(set(made))] * size
                of += [label] * size
            others = random.Random(0).sample(others, min(TESTED, len(others)))
            shown += [item.path for item in others]
            truth += [label] * len(others)
        names = [classes[label] for label in labels]
        mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        views = torch.stack([read(clip, images), read(clip, mirrored)])
        weight, bias = clip.scaled(clip.zero_shot_classifier(names))
        facts = np.stack([load_with_facts(image)[1].numbers for image in images])
        text = (weight.detach(), bias.detach())
        tested = read(clip, shown)
        labels = torch.tensor(of)
        return Drawn(
            names,
            text,
            clip.parts,
            views,
            facts,
            labels,
            torch.tensor(made),
            tested,
            torch.tensor(truth),
        )

    def fit(self, kept: Tensor, groups: Tensor | None) -> TextProbe:
        reading = ReadingFeatures(self.views[:, kept], self.text, self.parts)
        return fit_on_features(self.classes, self.labels[kept], [reading], groups=groups)[0]

    def answers(self, probe: TextProbe, parts: Tensor) -> tuple[Tensor, np.ndarray]:
        """Logits (m, C), and which images are refused (m,)."""
        joined = parts / len(self.parts) ** 0.5
        logits = probe(F.linear(parts[:, : self.parts[EMBEDDING]], *self.text), joined, self.classes)
        scores = in_distribution_score(logits.numpy(), probe.measure(self.classes)(joined).numpy())
        return logits, scores < probe.threshold.item()

    @torch.no_grad()
    def measured(self, draw: int) -> Iterator[tuple[str, Any]]:
        """Groups found, by pairs; then for heads that know the groups found, and for those that do not, what
        they refuse; and the accuracy that is told by folds, with its interval, beside that on other
        photographs."""
        names = [""] * len(self.labels)
        joined = self.views[0, :, : sum(list(self.parts.values())[:2])].numpy()  # which images are compared by
        for number, group in enumerate(find_groups(joined, self.facts), 1):
            for i in group:
                names[i] = str(number)
        groups = group_ids(names)
        all_images = torch.arange(len(self.labels))
        same, true = (each[:, None] == each for each in (groups, self.made))
        upper = torch.ones_like(same).triu(1)
        yield "pairs made", int((true & upper).sum())
        yield "pairs found", int((same & upper).sum())
        yield "pairs right", int((same & true & upper).sum())
        yield "groups", int(groups.max()) + 1
        if draw <= 2:
            yield "refused without groups", self.percent(self.answers(self.fit(all_images, None), self.test)[1])
        logits, refused = self.answers(self.fit(all_images, groups), self.test)
        yield "refused", self.percent(refused)
        truth = self.percent((logits.argmax(1) == self.test_labels).numpy())
        yield "top1", truth
        yield "test images", len(self.test_labels)
        items = []
        answers = []
        for out in folds(self.labels, groups):
            kept = all_images[~torch.isin(all_images, out)]
            answers.append(self.answers(self.fit(kept, groups[kept]), self.views[0, out])[0])
            items += [Item("", "", int(self.labels[i]), group=names[i]) for i in out.tolist()]
        told = Evaluation(self.classes, items, torch.cat(answers)).accuracy
        low, high = told.interval
        yield "top1 told", round(told.percent, 2)
        yield "interval low", round(low, 2)
        yield "interval high", round(high, 2)
        yield "in interval", int(low <= truth <= high)
        third = told._replace(correct=round(0.3 * told.correct), images=round(0.3 * told.images), independent=None)
        yield "interval of three tenths", round(third.interval[1] - third.interval[0], 2)

    @staticmethod
    def percent(hits: np.ndarray) -> float:
        return round(100 * float(hits.mean()), 2)


if __name__ == "__main__":
    typer.run(main)
