"""How well heads tell images of none of their classes from those of their classes, on features of the
miniature.

    python benchmarks/rejection.py --data-root DATA              writes results/rejection.csv
    python benchmarks/rejection.py --data-root DATA --choose     writes results/rejection_choice.csv
    python benchmarks/rejection.py --real-clip CLIP_FOLDER       writes results/rejection_clip.csv
    python benchmarks/rejection.py --data-root DATA --real-clip CLIP_FOLDER --examples  # writes rejection_examples.csv

Each resumes when repeated. DATA: see `sets.py`. A text probe is trained on a few images of half of the
classes of a set, another half for every seed. Its known test images are compared with test images of the
other half ("near"), and of all other sets ("far"; PACS's domains, which share their classes, are not far
from each other). The threshold comes from the training images.
--choose compares scores on the sets for choosing. (The one that heads use was chosen on PACS art paintings
and cartoons and 40 classes of Tiny ImageNet.) --real-clip takes features of
the real CLIP ViT-B/32, see `real_clip.py`, without its text, of which only parts are known; these sets took
part in the choice. Of two sets that share a kind of thing neither is far from the other.

--examples gives a head of at most 20 classes images of up to three look-alikes, of the classes of the other
half whose training images it accepts most. The rule, and that its margin rejects 2 % of known images, was
chosen on the features of the real CLIP; nothing was chosen on the reporting sets, whose features are the
miniature's.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from growing import GrowingTable
from sets import CHOOSING, REPORTING, of_class
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.answers import DISTANCE_WEIGHT
from dcp_zoo.backbone.towers.open_clip import EMBEDDING
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import Item
from dcp_zoo.data.packaged import everyday_pictures
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.views import MIRRORED, PLAIN
from dcp_zoo.probe.fit import ReadingFeatures, fit_on_features
from dcp_zoo.probe.folds import within_class
from dcp_zoo.probe.model import nearest
from dcp_zoo.training.methods.text_probe import on_cpu
from dcp_zoo.zoo.build import plain_clip

RESULTS = Path(__file__).parent / "results"
MODEL = "dcp_mini"
IMAGES = (1, 2, 6, 16)
SEEDS = (1, 2)
FAR = 200
CLIP_IMAGES = 2, 4, 8  # images per class of the real CLIP
COLUMNS = "set images_per_class seed score auroc_near auroc_far known_refused near_passed far_passed".split()
COLUMNS += ["near_passed_estimate", "far_passed_estimate"]
EXAMPLE_COLUMNS = "part set seed examples known_refused alike_passed far_passed".split()
HEADS_OWN = "entropy and distance"  # the score that heads reject by
REAL = {"Caltech-101": "caltech101", "flowers": "oxford_flowers", "actions": "ucf101", "aircraft": "fgvc"}
RELATED = [{"Caltech-101", "flowers"}, {"Caltech-101", "aircraft"}]
EXAMPLES = 6, 7  # images of each class of a head, and examples of each look-alike
DRAWS = range(1, 7)
Linear = tuple[Tensor, Tensor]


class RealFeatures:
    """Those of the real CLIP for one set, without text: of its 16 training images per class, half of which
    are the test images here. The set's own test images will not do: a training image's features are a mean
    over ten augmented views, a test image's those of one."""

    def __init__(self, path: Path) -> None:
        arrays = np.load(path)
        self.names = [str(name) for name in arrays["classnames"]]
        labels = torch.from_numpy(arrays["train16_label"]).long()
        vectors = F.normalize(torch.from_numpy(arrays["train16_vector"]).float(), dim=-1)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        vectors = vectors[order]
        labels = labels[order]
        first = within_class(labels) < 8
        self.train = vectors[None, first]
        self.labels = labels[first]
        self.test = vectors[~first]
        self.test_labels = labels[~first]
        self.text = torch.zeros(len(self.names), vectors.shape[1]), torch.zeros(len(self.names))
        self.parts = {EMBEDDING: vectors.shape[1]}
        self.everyday = None


class Features:
    """Those of the miniature for one set: of its training images and their mirror images, and of its test
    images."""

    def __init__(self, make: Callable[[Path, Path], Any], data: Path, folder: Path, few: bool = False) -> None:
        clip = plain_clip(MODEL)
        pool = make(data, folder)
        self.names, train, test = pool
        if few:
            train, test = (self.drawn(items, *most) for items, most in ((train, (60, 1200)), (test, (40, 1000))))
        extract = FeatureExtractor(clip, progress=progress_bar)
        trained = extract(Photos(train), views=(PLAIN, MIRRORED))
        tested = extract(Photos(test))
        self.parts = clip.parts
        scale = len(clip.parts) ** -0.5
        self.train = trained.rows(PLAIN, MIRRORED) * scale
        self.labels = trained.labels
        self.test = tested.joined
        self.test_labels = tested.labels
        self.text = on_cpu(clip.scaled(clip.zero_shot_classifier(self.names)))
        pictures = [Item(picture, "", 0) for picture in everyday_pictures()]
        self.everyday = extract(Photos(pictures)).joined

    def drawn(self, items: Sequence[Item], each: int, most: int) -> list[Item]:
        """So many of each class, and about `most` in all."""
        each = max(10, min(each, most // len(self.names)))
        of_each = (of_class(items, label) for label in range(len(self.names)))
        return [item for own in of_each for item in random.Random(1).sample(own, min(each, len(own)))]


def fitted(own: Any, rows: Sequence[int], classes: Sequence[int], examples: Sequence[int] = ()) -> tuple[Any, Any]:
    """A text probe for these of a set's classes on these of its training images, and how it was fitted;
    `examples` are those of none of the classes."""
    labels = torch.tensor([classes.index(label) for label in own.labels[rows].tolist()])
    text = own.text[0][classes], own.text[1][classes]
    views = own.train[:, rows] * len(own.parts) ** 0.5
    named = [own.names[label] for label in classes]
    none = own.train[0, examples] * len(own.parts) ** 0.5 if examples else None
    return fit_on_features(named, labels, [ReadingFeatures(views, text, own.parts)], examples=none)


def whole(own: Any, classes: Sequence[int]) -> Linear:
    """The text logits of these classes as a function of all features, of which the first part reads text."""
    weight = own.text[0][classes]
    bias = own.text[1][classes]
    return F.pad(weight * len(own.parts) ** 0.5, (0, sum(own.parts.values()) - own.parts[EMBEDDING])), bias


def scores(views: Tensor, text: Linear, probe: Any, f: Tensor) -> dict[str, Tensor]:
    """What different scores say of features f (m, F): higher for images of the classes."""
    z = F.linear(f, *probe.linear(text, probe.classes))
    logs = z.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    distance = probe.measure(probe.classes)(f)
    unit = probe.measure(probe.classes).unit
    found = {
        HEADS_OWN: -entropy - DISTANCE_WEIGHT * distance,
        "distance to the nearest class mean": -distance,
        "distance to the nearest training image": -nearest(f * unit, views[0] * unit),
        "cosine to the nearest training image": (f @ views[0].T).amax(-1),
        "entropy": -entropy,
        "maximum probability": logs.amax(-1),
        "energy": z.logsumexp(-1),
    }
    if text[0].any():
        found["maximum probability of zero-shot (MCM)"] = F.linear(f, *text).log_softmax(-1).amax(-1)
    return found


def is_far(name: str, other: str) -> bool:
    """Whether no image of the other set shows a class of this one."""
    return name != other and not (name[:4] == other[:4] == "PACS") and {name, other} not in RELATED


def measured(
    name: str, sets: Mapping[str, Features | RealFeatures], images: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each score: AUROC against near and far images, and what the head's own threshold refuses."""
    own = sets[name]
    rng = random.Random(seed)
    classes = sorted(rng.sample(range(len(own.names)), len(own.names) // 2))
    of_each = [(own.labels == label).nonzero().flatten().tolist() for label in classes]
    rows = [row for found in of_each for row in rng.sample(found, min(images, len(found)))]
    views = own.train[:, rows]
    text = whole(own, classes)
    (probe, info) = fitted(own, rows, classes)
    known = torch.isin(own.test_labels, torch.tensor(classes))
    others = torch.cat([each.test[:FAR] for other, each in sets.items() if is_far(name, other)])
    parts = own.test[known], own.test[~known], others
    found_scores = [scores(views, text, probe, f) for f in parts]
    for score in found_scores[0]:
        inside, near, far = (found[score] for found in found_scores)
        row = {"set": name, "images_per_class": images, "seed": seed, "score": score}
        row |= {"auroc_near": auroc(inside, near), "auroc_far": auroc(inside, far)}
        if score == HEADS_OWN and not probe.cannot_reject(probe.classes):
            threshold = probe.threshold
            accepted, *passed = (100 * (x >= threshold).float().mean().item() for x in (inside, near, far))
            row |= {"known_refused": 100 - accepted, "near_passed": passed[0], "far_passed": passed[1]}
            estimates: Any = info.get("like_accepted", {})
            row["near_passed_estimate"] = estimates.get("0.05")
            if own.everyday is not None:
                found = scores(views, text, probe, own.everyday)[score]
                row["far_passed_estimate"] = 100 * (found >= threshold).float().mean().item()
        yield row


def with_examples(part: str, name: str, sets: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """A row for each number of examples of look-alikes: the percentages of images that are refused or
    accepted."""
    own = sets[name]
    rng = random.Random(seed)
    classes = sorted(rng.sample(range(len(own.names)), min(20, len(own.names) // 2)))
    of_each = [rng.sample((own.labels == label).nonzero().flatten().tolist(), EXAMPLES[0]) for label in classes]
    rows = [row for found in of_each for row in found]
    text = whole(own, classes)

    def accepted(probe: Any, f: Tensor) -> float:
        found = scores(own.train[:, rows], text, probe, f)[HEADS_OWN]
        return 100 * (found >= probe.threshold).float().mean().item()

    probe, _ = fitted(own, rows, classes)
    if probe.cannot_reject(probe.classes):  # of too few images
        return
    others = [label for label in range(len(own.names)) if label not in classes]
    passed = {label: accepted(probe, own.train[0, own.labels == label]) for label in others}
    alike = sorted(others, key=passed.__getitem__)[-max(6, len(others) // 3) :]
    alike = rng.sample(alike, min(3, len(alike)))
    pool = [rng.sample((own.labels == label).nonzero().flatten().tolist(), EXAMPLES[1]) for label in alike]
    examples = [row for each in zip(*pool, strict=True) for row in each]
    tested = {"known_refused": torch.isin(own.test_labels, torch.tensor(classes))}
    tested |= {"alike_passed": torch.isin(own.test_labels, torch.tensor(alike))}
    images = {what: own.test[which] for what, which in tested.items()}
    images["far_passed"] = torch.cat([each.test[:FAR] for other, each in sets.items() if is_far(name, other)])
    for number in (0, 5, 20):
        probe, _ = fitted(own, rows, classes, examples=examples[:number])
        shares = {what: accepted(probe, f) for what, f in images.items()}
        shares["known_refused"] = 100 - shares["known_refused"]
        yield {"part": part, "set": name, "seed": seed, "examples": number, **shares}


def auroc(inside: Tensor, outside: Tensor) -> float:
    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return 100 * float(roc_auc_score(labels.numpy(), torch.cat([inside, outside]).numpy()))


def main(
    data_root: Annotated[Path | None, typer.Option(help="Folder with the sets, see sets.py.")] = None,
    real_clip: Annotated[Path | None, typer.Option(help="Folder with features of the real CLIP.")] = None,
    choose: Annotated[bool, typer.Option("--choose", help="Compare scores on the sets for choosing.")] = False,
    examples: Annotated[bool, typer.Option("--examples", help="With --real-clip: measure examples of none.")] = False,
) -> None:
    """Measure what the table does not have yet."""
    parts: dict[str, dict[str, Any]] = {}
    if real_clip:
        parts["choosing"] = {name: RealFeatures(real_clip / f"{file}.npz") for name, file in REAL.items()}
    if data_root:
        made = CHOOSING if choose else REPORTING
        with TemporaryDirectory() as folder:
            sets = {name: Features(make, data_root, Path(folder), examples) for name, make in made.items()}
        parts["choosing" if choose else "reporting"] = sets
    if not parts or (examples and len(parts) < 2):
        raise typer.BadParameter("give --data-root or --real-clip, for --examples both")
    if examples:
        table = GrowingTable(RESULTS / "rejection_examples.csv", EXAMPLE_COLUMNS, EXAMPLE_COLUMNS[:3])
        for seed, part in product(DRAWS, parts):
            for name in parts[part]:
                if (part, name, seed) not in table:
                    table.add(map(rounded, with_examples(part, name, parts[part], seed)))
        return
    ((_, sets),) = parts.items()
    numbers, suffix = (CLIP_IMAGES, "_clip") if real_clip else (IMAGES, "_choice" * choose)
    table = GrowingTable(RESULTS / f"rejection{suffix}.csv", COLUMNS, COLUMNS[:3])
    for images, seed, name in product(numbers, SEEDS, sets):
        if (name, images, seed) not in table:
            table.add(map(rounded, measured(name, sets, images, seed)))


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()}


if __name__ == "__main__":
    typer.run(main)
