"""Methods that need nothing but features, at their strongest, on any features: five draws at 1 to 16 images
per class.

    python benchmarks/baselines.py features DATA FEATURES      reads every set once; resumes when repeated
    python benchmarks/baselines.py measure FEATURES            writes results/baselines.csv; resumes

DATA: see `sets.py`, of which the sets for reporting and those for choosing are read; draws and test images
are those of `many_sets.py`. FEATURES has a file for each set with several readings of its images: `x` is
CLIP's vector, `stem` the mean over positions of the maps of the miniature's stem, `stage` that of earlier
maps, each scaled to the length 1. `x+stem` joins both, for any method; `x,stem,stage` are all as a text
probe reads them, and for it alone. Where `x` is not the first there is no text, and only methods without
text are measured. The text probe's rows are in `reads.py`.

No method sees validation images, but for those named "with validation images": those of `many_sets.py`.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from given_features import GivenCLIP, given_table
from growing import GrowingTable
from many_sets import MODEL, RESULTS, TEST_IMAGES, draw, scores
from sets import CHOOSING, REPORTING
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import TEMPLATE
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import Item, Split
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.views import MIRRORED, PLAIN
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.probe.estimates import class_means, text_scale
from dcp_zoo.probe.folds import left_out
from dcp_zoo.training.evaluation import EVAL_BATCH
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import mirrored, plain
from dcp_zoo.training.methods.linear import LinearProbeRecipe, regression
from dcp_zoo.training.methods.text_probe import on_cpu
from dcp_zoo.training.recipes import BaseRecipe
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.build import plain_clip

COLUMNS = "weights set classes images_per_class seed method reading top1 ece nll test_images train_cpu_seconds".split()
NEAREST = "nearest class mean"
VALIDATED = ", with validation images"
CHOSEN_C = "linear-probe, C by cross-validation"
CS = (0.1, 1.0, 10.0, 100.0, 1000.0)
NAMES: dict[str, Mapping[str, Any]] = {  # options of each; those of the papers where not named
    "zero-shot": {},
    NEAREST: {},
    "linear-probe": {},
    "linear-probe, C = 100": {"C": 100.0},
    CHOSEN_C: {},
    "gda": {},
    f"gda{VALIDATED}": {},
    "gda, without text": {"text": False},
    "lp-plus-plus": {},
    f"lp-plus-plus{VALIDATED}": {},
    "tip-adapter": {},
    f"tip-adapter{VALIDATED}": {},
    "tip-adapter-f": {},
    f"tip-adapter-f{VALIDATED}": {},
    "proker": {},
    f"proker{VALIDATED}": {},
    "ss-text": {},
    "clap": {},
    "clip-adapter": {},
    "taskres": {},
}
WITHOUT_TEXT = (NEAREST, "linear-probe", "linear-probe, C = 100", CHOSEN_C, "gda, without text")
app = typer.Typer()


# ------------------------------------------------------------------------------------------------------------ features


@app.command()
def features(data: Path, output: Path) -> None:
    """Read the images of every set once, and the mirror images of those to train on."""
    clip = plain_clip(MODEL)
    output.mkdir(parents=True, exist_ok=True)
    for name, make in {**REPORTING, **CHOOSING}.items():
        file = output / f"{name}.npz"
        if file.exists():
            continue
        with TemporaryDirectory() as folder:
            names, train, test = make(data, Path(folder))
            test = random.Random(0).sample(test, min(TEST_IMAGES, len(test)))
            weight, _ = on_cpu(clip.scaled(clip.zero_shot_classifier(names)))
            lengths = clip.encode_sentences(names, TEMPLATE).norm(dim=-1)  # which TaskRes reads
            arrays: dict[str, Any] = {"names": names, "text_weight": weight.detach(), "text_lengths": lengths.detach()}
            for part, items, views in (("train", train, 2), ("test", test, 1)):
                started = time.process_time()
                arrays |= {f"{part}_{key}": value for key, value in read(clip, items, views).items()}
                arrays[f"{part}_seconds"] = (time.process_time() - started) / len(items)
                arrays[f"{part}_labels"] = [item.label for item in items]
        np.savez(file, **arrays)


@torch.no_grad()
def read(clip: FrozenCLIP, items: Sequence[Item], views: int) -> dict[str, Tensor]:
    """Each reading (V, n, E) of the images and, for two views, their mirror images."""
    whole = FeatureExtractor(clip, progress=progress_bar)(Photos(items), views=(PLAIN, MIRRORED)[:views])
    parts = whole.rows(*whole.views).split([*clip.parts.values()], -1)
    return dict(zip(("x", "stem", "stage"), parts, strict=True))


class Known:
    """A set's features by one reading: images to draw from, with their rows for paths, and test images."""

    def __init__(self, file: Path, reading: str) -> None:
        arrays = np.load(file)
        apart = "," in reading
        parts = reading.split("," if apart else "+")
        self.names = [str(name) for name in arrays["names"]]
        self.cost = float(arrays["train_seconds"])
        labels = arrays["train_labels"].tolist()
        self.items = [Item(str(row), str(row), label) for row, label in enumerate(labels)]
        scale = 1 if apart else len(parts) ** -0.5  # of joined parts
        train, test = (
            scale * torch.cat([torch.from_numpy(arrays[f"{part}_{each}"]) for each in parts], -1)
            for part in ("train", "test")
        )
        self.views = train
        self.clip = GivenCLIP()
        self.has_text = parts[0] == "x"
        text = torch.from_numpy(arrays["text_weight"]) * self.has_text
        # joined features, of length 1, hold x times 1 / sqrt(parts), and parts of which text says nothing
        self.clip.clip.logit_scale.fill_(math.log((float(text[0].norm()) or 1.0) / scale))
        more = train.shape[-1] - text.shape[-1]
        padded = F.pad(F.normalize(text, dim=-1), (0, 0 if apart else more))
        padded *= torch.from_numpy(arrays["text_lengths"])[:, None]
        self.clip.given_texts = dict(zip(self.names, padded, strict=True))
        self.clip.clip.output_dim = padded.shape[-1]
        self.clip.further = {part: arrays[f"train_{part}"].shape[-1] for part in parts[1:]} if apart else {}
        tested = [Item("", str(i), label) for i, label in enumerate(arrays["test_labels"].tolist())]
        self.test = self.table(tested, test)

    def drawn(self, images: int, seed: int) -> Split:
        """Training images of one draw, and all test images."""
        return draw((self.names, self.items, self.test.items), images, seed)

    def images(self, items: Sequence[Item]) -> ImageLoader:
        rows = [int(item.path) for item in items]
        return self.table(items, self.views[:, rows])

    def table(self, items: Sequence[Item], views: Tensor) -> ImageLoader:
        """These images, of which features (V, n, F) are given."""
        return ImageLoader.of_features(
            given_table(items, [view.split([*self.clip.parts.values()], -1) for view in views])
        )


# ------------------------------------------------------------------------------------------------------------- measure


@app.command()
def measure(kept: Annotated[Path, typer.Argument(help="The folder that `features` wrote.")]) -> None:
    """Measure what the table does not have for the current weights yet."""
    table = GrowingTable(RESULTS / "baselines.csv", COLUMNS, [*COLUMNS[:2], *COLUMNS[3:7]])
    weights = weights_id(MODEL)
    for reading, name in product(("x", "stem", "x+stem"), REPORTING):
        known = Known(kept / f"{name}.npz", reading)
        cells = product((4, 1, 16, 2, 8), range(1, 6), NAMES)  # images per class, draws, methods
        for number, seed, method in cells:
            key = weights, name, number, seed, method, reading
            if key not in table and (known.has_text or method in WITHOUT_TEXT):
                head = weights, name, len(known.names), number, seed, method, reading
                table.add([(*head, *measured(known, number, seed, method))])


def measured(known: Known, images: int, seed: int, method: str) -> tuple[Any, ...]:
    """Top-1 and ECE in percent, cross-entropy, test images, and CPU seconds of training, with those of the
    features."""
    split = known.drawn(images, seed)
    started = time.process_time()
    name = method.split(",")[0]
    train = known.images(split.train)
    val = known.images(split.val).table() if method.endswith(VALIDATED) and split.val else None
    task = Task(known.clip, MODEL, known.names, TEMPLATE, train, val, BaseRecipe(), seed)
    if name in METHODS:
        task.recipe = METHODS[name].recipe(MODEL, "folder", images, "few-shot").updated(NAMES.get(method, {}))
    if method == CHOSEN_C:
        task.recipe = min((replace(task.recipe, C=C) for C in CS), key=lambda recipe: loss_left_out(task, recipe))
    head = fit_head(name, task) if name in METHODS else to_nearest_mean(task)
    seconds = time.process_time() - started + known.cost * len(split.train) * (name != "zero-shot")
    return *scores(torch.from_numpy(outputs_of_loader(head, known.test, EVAL_BATCH).logits), known.test.labels), round(
        seconds, 1
    )


def loss_left_out(task: Task, recipe: LinearProbeRecipe) -> float:
    """The log loss of scaled logits on images that were left out; for one image per class the default C is
    the best."""
    table = task.images.table(views=mirrored(task)).embeddings
    fit = partial(regression, recipe=recipe)
    held_out = left_out(table.rows(*table.views), table.labels, table.groups, fit)
    if held_out is None:
        return abs(recipe.C - LinearProbeRecipe.C)
    logits = held_out[1]
    labels = table.labels[held_out[0]]
    return F.cross_entropy(text_scale(logits, labels) * logits, labels).item()


def to_nearest_mean(task: Task) -> LinearHead:
    """By the cosine with the mean of each class, as zero-shot CLIP by that with its text."""
    table = task.images.table(views=plain(task)).embeddings
    means = class_means(task.embeddings(table), table.labels, len(task.classnames))
    return task.text_head(F.normalize(means, dim=-1).float())


if __name__ == "__main__":
    app()
