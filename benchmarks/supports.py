"""Methods on features, where images come as they come: classes have many training images, one or none, and there are no
validation images.

    python benchmarks/supports.py --data-root DATA --features FEATURES     writes results/supports.csv; resumes

DATA holds `caltech-101` in CoOp's layout, whose training images are drawn without regard to their class; FEATURES are
those of `real_clip.py arrange`, of ImageNet and of Caltech-101's named classes, of which every image of the largest
balanced draw is as likely. K x C images in each of twenty draws. A method that cannot be fitted without images of a
class is fitted on the others, and never names that class.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from given_features import GivenFeatures
from tuning import GrowingTable

from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import load_split
from dcp_zoo.model.classes import TEMPLATE
from dcp_zoo.model.inputs import Features
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, expected_calibration_error, predict, top1
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.sources import ImageSource, image_source
from dcp_zoo.zoo.factory import plain_clip

RESULTS = Path(__file__).parent / "results" / "supports.csv"
COLUMNS = ("set", "classes", "images_per_class", "draw", "method", "top1", "balanced", "ece", "without_images")
NAMES = ("zero-shot", "linear-probe", "tip-adapter", "gda", "lp-plus-plus", "clap", "text-probe")
WITHOUT = ("zero-shot", "tip-adapter", "text-probe")  # which classes without images do not trouble
SETS = {  # images per class
    "ViT-B/32, Caltech-101 named": 4,
    "miniature, Caltech-101": 4,
    "ViT-B/32, ImageNet": 2,
}
DRAWS = 20
LARGEST = 500  # classes for which the linear probe's search takes seconds


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")],
    features: Annotated[Path, typer.Option(help="The folder that `real_clip.py arrange` wrote.")],
) -> None:
    """Measure what the file of results does not have yet."""
    table = GrowingTable(RESULTS, COLUMNS, ("set", "draw", "method"))
    for name, shots in SETS.items():
        missing = [(d, m) for d in range(1, DRAWS + 1) for m in NAMES if (name, d, m) not in table]
        if not missing:
            continue
        names, train, test = sources(name, data_root, features)
        for draw, method in missing:
            if method == "linear-probe" and len(names) > LARGEST:
                continue
            kept = random.Random(draw).sample(range(len(train.items)), shots * len(names))
            few = replace(train, views=train.features(), form=Features).of(kept)
            row = measured(method, names, few, test)
            without = len(names) - len({item.label for item in few.items})
            table.add([(name, len(names), shots, draw, method, *row, without)])


def sources(name: str, data_root: Path, features: Path) -> tuple[list[str], ImageSource, ImageSource]:
    """Class names, the images to draw from, and the test images."""
    if name.startswith("miniature"):
        clip, split = plain_clip("dcp_mini"), load_split("caltech101", data_root)
        train = image_source(clip, split.train, "flip", progress=progress_bar)
        return split.classnames, train, image_source(clip, split.test, progress=progress_bar)
    dataset, folder, most = ("imagenet", "imagenet-4", 4) if "ImageNet" in name else ("caltech101", "named", 16)
    given = GivenFeatures(features / folder)
    split = given.subset(dataset, "all", most, 1)
    return split.classnames, given.read(split.train), given.read(split.test)


def measured(method: str, names: list[str], train: ImageSource, test: ImageSource) -> tuple[float, float, float]:
    """Top-1, balanced top-1 and ECE in percent."""
    present = list(range(len(names))) if method in WITHOUT else sorted({item.label for item in train.items})
    place = {label: i for i, label in enumerate(present)}
    few = replace(train, items=[item._replace(label=place[item.label]) for item in train.items])
    options: Any = METHODS[method].recipe("dcp_vitb32", "folder", 4, "few-shot").updated({"augment": "none"})
    task = Task(train.clip, "dcp_vitb32", [names[label] for label in present], TEMPLATE, few, None, options)
    logits = torch.full((len(test.items), len(names)), -1e4)
    logits[:, present] = predict(fit_head(method, task), test, EVAL_BATCH)
    found = Evaluation(names, test.items, logits)
    balanced = found.balanced if found.balanced is not None else found.accuracy.percent
    return top1(logits, test.labels), round(balanced, 2), expected_calibration_error(logits, test.labels)


if __name__ == "__main__":
    typer.run(main)
