"""Check the miniature's recipe: DCP with changed hyperparameters, on validation images only.

    python benchmarks/tuning.py --data-root DATA

DATA holds `caltech-101` in CoOp's layout. Each choice is trained on the few-shot images of seed 1 and tested on 1,200
of the dataset's validation images. `results/tuning.csv` identifies the weights of each row; rows of the current weights
are not measured again.
"""

import csv
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from dcp_zoo.benchmark.images import TrialImages, weights_id
from dcp_zoo.benchmark.trial import Trial, default_of
from dcp_zoo.cli.console import log, progress_bar
from dcp_zoo.data.table import find_spec
from dcp_zoo.methods import METHODS
from dcp_zoo.methods.base import Task
from dcp_zoo.training.loop import top1
from dcp_zoo.training.sources import ImageSource, image_source

RESULTS = Path(__file__).parent / "results" / "tuning.csv"
COLUMNS = ("weights", "method", "shots", "changes", "top1", "top1_train")
MODEL, DATASET, SEED = "dcp_mini", "caltech101", 1
VALIDATION_IMAGES = 1200


def choice(shots: int, **changes: Any) -> Trial:
    """DCP with these changes to its recipe."""
    return Trial("few-shot", MODEL, "dcp", DATASET, shots, SEED, options=tuple(changes.items()))


CHOICES = (
    choice(4),
    choice(4, lr=0.001, batch_size=8),
    choice(4, batch_size=8),
    choice(4, epochs=50),
    choice(4, shared=False),
    choice(16),
)


def main(data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")]) -> None:
    """Measure every choice that `results/tuning.csv` does not have for the current weights yet."""
    known = {tuple(row[:4]) for row in csv.reader(RESULTS.open())} if RESULTS.is_file() else set()
    trials = {(weights_id(MODEL), trial.method, str(trial.shots), trial.changes): trial for trial in CHOICES}
    images = TrialImages(MODEL, "cpu", data_root, workers=0)
    images.progress = progress_bar
    validation = validation_source(images)
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not known:
            writer.writerow(COLUMNS)
        for key, trial in trials.items():
            if key not in known:
                row = (*key, *accuracies(trial, images, validation))
                writer.writerow(row)
                file.flush()
                log(" ".join(map(str, row)))


def validation_source(images: TrialImages) -> ImageSource:
    """The same validation images for every choice."""
    items = list(images.split(DATASET).val)
    random.Random(0).shuffle(items)
    return image_source(images.clip, items[:VALIDATION_IMAGES], progress=progress_bar)


def accuracies(trial: Trial, images: TrialImages, validation: ImageSource) -> list[float]:
    """Top-1 in percent on the validation images and on the training images."""
    recipe = default_of(trial).updated(dict(trial.options))
    train, _, _ = images.train(DATASET, "all", trial.shots, SEED, recipe.augment)
    names, template = images.split(DATASET).classnames, find_spec(DATASET).template
    task = Task(images.clip, MODEL, names, template, train, None, recipe, seed=SEED, progress=progress_bar)
    classifier = METHODS[trial.method].fit(task)
    return [top1(classifier.logits(source), source.labels) for source in (validation, task.plain_train)]


if __name__ == "__main__":
    typer.run(main)
