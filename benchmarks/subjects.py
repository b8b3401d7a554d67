"""Few subjects, many photographs: how often the sign shows, and what is told then beside what is true.

    python benchmarks/subjects.py --data-root DATA --clip CLIP --splits SPLITS    writes results/subjects.csv

DATA is as in `sets.py`; at most six classes of a set. A subject is one photograph, of which several are made
in one of the `WAYS`; the other photographs, which are tested, are each made once in the same way, except of
those that are left as they are. The sign was chosen on the sets for choosing with `crops` alone. CLIP has
`ucf101.npz`, CLIP's ViT-B/32 features of videos' frames, and SPLITS their names in CoOp's split: a subject is
a video there, its photographs are its clips, and what is fitted knows no text. Rows without `top1` count in
how many of 20 draws single photographs, as they are, show the sign.
"""

import json
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from growing import GrowingTable
from PIL import Image, ImageDraw
from sets import CHOOSING, REPORTING, Pool, of_class
from told import with_groups
from torch.nn import functional as F
from worth import some

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Item, Split, load_image
from dcp_zoo.data.groups import group_ids
from dcp_zoo.data.groups import with_groups as set_groups
from dcp_zoo.errors import ZooWarning
from dcp_zoo.features.cache import kept_features
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.groups import looks_few, with_subjects
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.fields import Values
from dcp_zoo.probe import ReadingFeatures, fit_on_features
from dcp_zoo.progress import no_progress
from dcp_zoo.training.evaluation import Evaluation, measure
from dcp_zoo.training.run import RunOptions, plan, train_head
from dcp_zoo.zoo.build import plain_clip

RESULTS = Path(__file__).parent / "results" / "subjects.csv"
KEY = ("weights", "set", "way", "classes", "subjects", "photographs", "draw")
COLUMNS = (*KEY, "shown", "found", "told", "told_low", "told_high", "low", "high", "top1", "refused_without", "refused")
MODEL = "dcp_mini"
CLASSES = 6
TESTED = 20
PATTERNS = ((4, 6), (3, 4))  # subjects of each class, and photographs of each
CLIPS = ((2, 3), (3, 4), (4, 4), (5, 3), (6, 1))
ALARMS = (2, 4, 8, 16)  # single photographs of a class
ALARM_CLASSES = (2, 10, 100)
ALARM_DRAWS = 20
POOL = 24  # photographs of a class that these are drawn from
Make = Callable[[Image.Image, random.Random, int], Image.Image]  # a photograph of a subject, by its number


def window(image: Image.Image, side: float, x: float, y: float) -> Image.Image:
    """A part with this share of the sides; x and y are 0 at the left and the top, 1 at the right and the
    bottom."""
    w, h = image.size
    left = x * (1 - side) * w
    top = y * (1 - side) * h
    return image.crop((round(left), round(top), round(left + side * w), round(top + side * h)))


def exposed(image: Image.Image, gamma: float) -> Image.Image:
    return image.point(lambda value: round(255 * (value / 255) ** gamma))


def crops(photo: Image.Image, rng: random.Random, subject: int) -> Image.Image:
    """A part of 55 to 70 % of the sides, mirrored or not, turned by up to 20 degrees, in other light."""
    image = window(photo, rng.uniform(0.55, 0.7), rng.random(), rng.random())
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-20, 20)
    turn = math.radians(abs(angle))
    whole = 1 / (math.cos(turn) + math.sin(turn))  # without the corners that a turn leaves empty
    image = window(image.rotate(angle, Image.Resampling.BICUBIC), whole, 0.5, 0.5)
    hue, saturation, value = image.convert("HSV").split()
    shift = rng.randint(-20, 20)
    hue = hue.point(lambda shade: (shade + shift) % 256)
    image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return exposed(image, rng.uniform(0.6, 1.6))


def on_background(photo: Image.Image, rng: random.Random, subject: int) -> Image.Image:
    """A part of the photograph on a background of the subject's own: stripes of two colours."""
    own = random.Random(subject)
    colours = [tuple(own.randint(40, 215) for _ in range(3)) for _ in range(2)]
    width = own.randint(6, 30)
    ground = Image.new("RGB", (160, 160), colours[0])
    draw = ImageDraw.Draw(ground)
    for left in range(-rng.randint(0, width), 160, 2 * width):
        draw.rectangle((left, 0, left + width - 1, 160), colours[1])
    part = window(photo, rng.uniform(0.7, 0.95), rng.random(), rng.random())
    side = round(160 * rng.uniform(0.55, 0.8))
    ground.paste(part.resize((side, side)), (rng.randint(0, 160 - side), rng.randint(0, 160 - side)))
    return exposed(ground, rng.uniform(0.7, 1.4))


def frame(photo: Image.Image, rng: random.Random, subject: int) -> Image.Image:
    """A frame of a film in which the camera pans and zooms slowly, at any time of it."""
    own = random.Random(subject)
    begin, end = [(own.uniform(0.45, 0.8), own.random(), own.random()) for _ in range(2)]
    time = rng.random()
    side, x, y = (a + time * (b - a) for a, b in zip(begin, end, strict=True))
    return exposed(window(photo, side, x, y), rng.uniform(0.9, 1.1))


def screenshot(photo: Image.Image, rng: random.Random, subject: int) -> Image.Image:
    """A part of the photograph in a window on a screen, with bars and lines, in one of three styles."""
    paper, bar, ink = rng.choice([((255,) * 3, (225,) * 3, (90,) * 3), ((30,) * 3, (60,) * 3, (200,) * 3)])
    screen = Image.new("RGB", (200, 160), paper)
    draw = ImageDraw.Draw(screen)
    draw.rectangle((0, 0, 200, rng.randint(10, 22)), bar)
    for line in range(30, 160, 12):
        draw.line((4, line, rng.randint(20, 60), line), ink, 2)
    part = window(photo, rng.uniform(0.5, 0.9), rng.random(), rng.random())
    side = rng.randint(90, 130)
    screen.paste(part.resize((side, side)), (rng.randint(60, 200 - side), rng.randint(22, 160 - side)))
    return screen


WAYS: dict[str, Make] = {
    "crops": crops,
    "one background each": on_background,
    "frames of a pan": frame,
    "screenshots": screenshot,
}


def made(items: Sequence[Item], photographs: int, make: Make, folder: Path, seed: int) -> list[Item]:
    """So many photographs of each item, in files."""
    rng = random.Random(seed)
    folder.mkdir()
    found = []
    for number, item in enumerate(items):
        photo = load_image(item.path)
        for _ in range(photographs):
            path = folder / f"{len(found)}.png"
            make(photo, rng, 1000 * seed + number).save(path)
            found.append(Item(str(path), str(path), item.label))
    return found


def trained(names: Sequence[str], train: list[Item], test: list[Item], seed: int) -> tuple[Evaluation, float, float]:
    """What is told by folds, and of other photographs the accuracy and the share refused."""
    shown = list[Evaluation]()
    options = RunOptions(progress=no_progress, show=shown.append)
    run = plan(Split("folder", list(names), train), MODEL, "text-probe", seed=seed, device="cpu", describes=False)
    head, _ = train_head(run, None, options, by_folds=True)
    others = ImageLoader(Photos(test), FeatureExtractor(head.frozen))
    metrics, evaluation = measure(head, others, all_modes=False)
    return shown[0], next(iter(metrics.values())), evaluation.info.get("refused", math.nan)


def row(told: Evaluation, without: Evaluation, top1: float, refused: float, refused_without: float) -> Values:
    """What is told with the sign and without it, beside the truth."""
    shows = told.at_most is not None
    in_class: dict[int, set[str]] = {}
    for item in told.items:
        in_class.setdefault(item.label, set()).add(item.group or item.key)
    low, high = told.accuracy.interval
    told_low, told_high = without.accuracy.interval
    values: Values = {
        "shown": int(shows),
        "found": median(map(len, in_class.values())),
        "told": without.accuracy.percent,
        "told_low": told_low,
        "told_high": told_high,
        "low": low,
        "high": high,
        "top1": top1,
        "refused_without": refused_without,
        "refused": refused,
    }
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}


def without_sign(items: Sequence[Item]) -> list[Item]:
    """The items with the groups that are found, each other image alone, as if these were given."""
    return [item._replace(group=item.group or item.key) for item in with_groups(list(items))]


def by_embeddings(items: list[Item], embeddings: np.ndarray, groups: Sequence[list[int]] = ()) -> list[Item]:
    """The items in these groups, or in subjects."""
    return with_subjects(set_groups(items, groups), embeddings)


def alarms(items: Sequence[Item], embeddings: np.ndarray, images: int, classes: int) -> int:
    """In how many draws single photographs show the sign, with the groups that are found in all of them."""
    rng = random.Random(0)
    count = 0
    for _ in range(ALARM_DRAWS):
        drawn = list[int]()
        for label in rng.sample(sorted({item.label for item in items}), classes):
            drawn += rng.sample([i for i, item in enumerate(items) if item.label == label], images)
        groups: dict[str, list[int]] = {}
        for position, i in enumerate(drawn):
            groups.setdefault(items[i].group or items[i].key, []).append(position)
        single = [items[i]._replace(group="") for i in drawn]
        found = by_embeddings(single, embeddings[drawn], list(groups.values()))
        count += looks_few(found)
    return count


class Clips:
    """UCF-101's videos by CLIP's features of their clips."""

    def __init__(self, clip: Path, splits: Path) -> None:
        known = np.load(clip / "ucf101.npz", allow_pickle=True)
        listed = json.loads((splits / "split_zhou_UCF101.json").read_text())["test"]
        videos = [re.search(r"_g(\d+)_c\d+", name) for name, *_ in listed]
        self.embeddings = known["test_vector"].astype(np.float32)
        self.embeddings /= np.linalg.norm(self.embeddings, axis=1, keepdims=True)
        self.labels = known["test_label"]
        self.videos = np.array([int(video[1]) for video in videos if video])

    def drawn(self, classes: int, subjects: int, photographs: int, draw: int) -> Values:
        rng = random.Random(draw)
        train = list[int]()
        test = list[int]()
        names = list[str]()
        for label in rng.sample(range(101), 101):
            own = np.flatnonzero(self.labels == label)
            clips = {video: own[self.videos[own] == video].tolist() for video in set(self.videos[own].tolist())}
            enough = sorted(video for video, of_video in clips.items() if len(of_video) >= photographs)
            if len(enough) < subjects or len(names) == classes:
                continue
            chosen = rng.sample(enough, subjects)
            train += [i for video in chosen for i in rng.sample(clips[video], photographs)]
            test += [i for video, of_video in clips.items() if video not in chosen for i in of_video]
            names.append(str(label))
        items = [Item("", str(i), names.index(str(self.labels[i]))) for i in train]
        by_subject = by_embeddings(items, self.embeddings[train])
        told, top1, refused = self.fitted(names, by_subject, train, test)
        without, _, refused_without = self.fitted(names, items, train, test)
        if by_subject != items:
            told = replace(told, at_most=without.accuracy.interval[1])
        return row(told, without, top1, refused, refused_without)

    @torch.no_grad()
    def fitted(
        self, names: Sequence[str], items: Sequence[Item], train: Sequence[int], test: Sequence[int]
    ) -> tuple[Evaluation, float, float]:
        """As `trained`, of a text probe that knows no text."""
        x = torch.from_numpy(self.embeddings[train])
        text = torch.zeros(len(names), x.shape[1]), torch.zeros(len(names))
        labels = torch.tensor([item.label for item in items])
        groups = group_ids([item.group for item in items])
        probe, _ = fit_on_features(names, labels, [ReadingFeatures(x[None], text)], groups=groups, describes=False)
        held_out = probe.held_out
        assert held_out is not None
        told = Evaluation(names, [items[i] for i in held_out.positions.tolist()], held_out.logits)
        others = torch.from_numpy(self.embeddings[test])
        logits = probe(F.linear(others, *text), others, names)
        scores = in_distribution_score(logits.numpy(), probe.measure(names)(others).numpy())
        truth = np.array([names.index(str(label)) for label in self.labels[test]])
        right = logits.argmax(1).numpy() == truth
        return told, 100 * float(right.mean()), 100 * float((scores < probe.threshold.item()).mean())


def measure_set(
    name: str, pool: Pool, draw: int, folder: Path, known: Callable[..., bool], add: Callable[..., None]
) -> None:
    """All ways and patterns of a set."""
    names, train, test = pool
    labels = sorted(random.Random(0).sample(range(len(names)), min(CLASSES, len(names))))
    rng = random.Random(draw)

    def sampled(items: Sequence[Item], count: int) -> list[Item]:
        """So many of each class."""
        found = list[Item]()
        for number, label in enumerate(labels):
            own = of_class(list(items), label)
            found += [item._replace(label=number) for item in rng.sample(own, min(count, len(own)))]
        return found

    chosen = [names[label] for label in labels]
    subjects = {count: sampled(train, count) for count, _ in PATTERNS}
    others = sampled(test, TESTED)
    for way, make in WAYS.items():
        keys = {pattern: (name, way, len(labels), *pattern, draw) for pattern in PATTERNS}
        if all(known(*key) for key in keys.values()):
            continue
        with TemporaryDirectory(dir=folder) as place:
            tested = made(others, 1, make, Path(place) / "others", 100 + draw)
            for count, photographs in PATTERNS:
                if not known(*keys[count, photographs]):
                    images = made(subjects[count], photographs, make, Path(place) / f"{count}", draw)
                    told, top1, refused = trained(chosen, images, tested, draw)
                    without, _, refused_without = trained(chosen, without_sign(images), tested, draw)
                    add(row(told, without, top1, refused, refused_without), *keys[count, photographs])


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with the data sets.")],
    clip: Annotated[Path, typer.Option(help="Folder with ucf101.npz.")],
    splits: Annotated[Path, typer.Option(help="Folder with split_zhou_UCF101.json.")],
    draws: Annotated[int, typer.Option(help="Of each set, way and pattern.")] = 2,
    only: Annotated[list[str], typer.Option(help="These sets alone.")] = [],  # noqa: B006
) -> None:
    """Measure what the file of results does not have for the current weights yet."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ZooWarning)
    table = GrowingTable(RESULTS, COLUMNS, KEY)
    weights = weights_id(MODEL)

    def known(*key: object) -> bool:
        return (weights, *key) in table

    def add(values: Values, *key: object) -> None:
        table.add([dict(zip(KEY, (weights, *key), strict=True)) | values])

    videos = Clips(clip, splits)
    for subjects, photographs in CLIPS:
        for draw in range(1, 6):
            key = ("UCF-101", "clips of a video", CLASSES, subjects, photographs, draw)
            if not known(*key):
                add(videos.drawn(CLASSES, subjects, photographs, draw), *key)
    one_of_each = np.unique(np.stack([videos.labels, videos.videos]), axis=1, return_index=True)[1]
    clips = [Item("", str(i), int(videos.labels[i])) for i in one_of_each]
    pools = {"UCF-101": (clips, videos.embeddings[one_of_each])}
    with TemporaryDirectory() as name, kept_features():
        folder = Path(name)
        sets = {name: image_set(data_root, folder) for name, image_set in (CHOOSING | REPORTING).items()}
        sets = {name: sets[name] for name in only or sets}
        for name, (names, train, _) in sets.items():
            if not known(name, "single photographs", ALARM_CLASSES[0], ALARMS[-1], 1, ALARM_DRAWS):
                few = with_groups(some(train, len(names), POOL))
                seen = FeatureExtractor(plain_clip(MODEL))(Photos(few)).embeddings
                pools[name] = few, seen.rows()[0].numpy()
        for name, (items, embeddings) in pools.items():
            sizes = Counter(item.label for item in items)
            for images in ALARMS:
                enough = [i for i, item in enumerate(items) if sizes[item.label] >= images]
                most = sum(size >= images for size in sizes.values())
                for classes in sorted({min(count, most) for count in ALARM_CLASSES} - {0}):
                    key = (name, "single photographs", classes, images, 1, ALARM_DRAWS)
                    if not known(*key):
                        add({"shown": alarms([items[i] for i in enough], embeddings[enough], images, classes)}, *key)
        for draw in range(1, draws + 1):
            for name in [name for name in sets if name in REPORTING]:
                measure_set(name, sets[name], draw, folder, known, add)


if __name__ == "__main__":
    typer.run(main)
