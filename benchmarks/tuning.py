"""What the miniature's recipe was chosen by: methods with some of their numbers changed, on validation images alone.

    python benchmarks/tuning.py --data-root DATA

DATA holds `caltech-101` in CoOp's layout. Each choice is trained on the few-shot images of seed 1 and tested on 1,200
of the data set's own validation images; rows of `results/tuning.csv` that are there are not measured again.
"""

import csv
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from dcp_zoo.baselines import METHODS, Task
from dcp_zoo.benchmark.images import Images
from dcp_zoo.benchmark.trial import Trial, default_of
from dcp_zoo.cli.console import progress_bar, say
from dcp_zoo.data.table import find_spec
from dcp_zoo.sources import Source, image_source
from dcp_zoo.training import top1

RESULTS = Path(__file__).parent / "results" / "tuning.csv"
COLUMNS = ("method", "shots", "changes", "top1", "top1_train")
MODEL, DATASET, SEED = "dcp_mini", "caltech101", 1
VALIDATION_IMAGES = 1200


def choice(method: str, shots: int, lr: float, n_ctx: int, **others: Any) -> Trial:
    """A method with its learning rate, prompt tokens and whatever else is changed of its recipe."""
    options = {"lr": lr, "n_ctx": n_ctx, **others}
    return Trial("few-shot", MODEL, method, DATASET, shots, SEED, options=tuple(options.items()))


RATES = (0.001, 0.004, 0.015)
CHOICES = (
    *(
        choice(method, 4, lr, n)
        for method, n in (("coop", 16), ("vpt-deep", 8), ("maple", 2), ("dcp", 4))
        for lr in RATES
    ),
    *(choice(method, 4, 0.008, n) for method, n in (("coop", 16), ("vpt-deep", 16), ("maple", 4), ("dcp", 16))),
    *(choice("dcp", shots, 0.004, 16) for shots in (4, 16)),
    choice("dcp", 16, 0.004, 4),
    choice("dcp", 16, 0.008, 16),
    *(choice("dcp", 8, lr, 16) for lr in (0.002, 0.004)),
    choice("dcp", 4, 0.008, 16, shared=False),
    choice("dcp", 16, 0.004, 16, shared=False),
)


def main(data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")]) -> None:
    """Measure every choice that `results/tuning.csv` does not have yet."""
    known = {tuple(row[:3]) for row in csv.reader(RESULTS.open())} if RESULTS.is_file() else set()
    wanted = {(trial.method, str(trial.shots), trial.changes): trial for trial in CHOICES}
    images = Images(MODEL, "cpu", data_root, workers=0)
    images.progress = progress_bar
    validation = validation_source(images)
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not known:
            writer.writerow(COLUMNS)
        for key, trial in wanted.items():
            if key not in known:
                row = (*key, *accuracies(trial, images, validation))
                writer.writerow(row)
                file.flush()
                say(" ".join(map(str, row)))


def validation_source(images: Images) -> Source:
    """The same validation images for every choice."""
    items = list(images.split(DATASET).val)
    random.Random(0).shuffle(items)
    return image_source(images.clip, items[:VALIDATION_IMAGES], progress=progress_bar)


def accuracies(trial: Trial, images: Images, validation: Source) -> list[float]:
    """Top-1 in percent on the validation images, and on the training images themselves."""
    recipe = default_of(trial).updated(dict(trial.options))
    train, _, _ = images.train(DATASET, "all", trial.shots, SEED, recipe.augment)
    names, template = images.split(DATASET).classnames, find_spec(DATASET).template
    task = Task(images.clip, MODEL, names, template, train, None, recipe, seed=SEED, progress=progress_bar)
    classifier = METHODS[trial.method].fit(task)
    return [top1(classifier.logits(source), source.labels) for source in (validation, task.plain_train)]


if __name__ == "__main__":
    typer.run(main)
