"""What the miniature's recipe was chosen by: methods with some of their numbers changed, on validation images alone.

    python benchmarks/tuning.py --data-root DATA

DATA holds `caltech-101` in CoOp's layout. Each choice is trained on the few-shot images of seed 1 and tested on 1,200
of the data set's own validation images; rows of `results/tuning.csv` that are there are not measured again.
"""

import csv
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dcp_zoo.baselines import METHODS, Task, plain_clip
from dcp_zoo.benchmark.trial import Trial, default_of
from dcp_zoo.cli.console import progress_bar, say
from dcp_zoo.data import Split, few_shot, load_split
from dcp_zoo.data.table import find_spec
from dcp_zoo.sources import image_source
from dcp_zoo.training import top1

RESULTS = Path(__file__).parent / "results" / "tuning.csv"
COLUMNS = ("method", "shots", "changes", "top1", "top1_train")
VALIDATION_IMAGES = 1200
SEED = 1


@dataclass(frozen=True)
class Choice:
    """A method, and what is changed of its recipe; prompt tokens and learning rate are always said."""

    method: str
    shots: int
    lr: float
    n_ctx: int
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> dict[str, Any]:
        return {"lr": self.lr, "n_ctx": self.n_ctx, **self.changes}

    @property
    def key(self) -> tuple[str, str, str]:
        return self.method, str(self.shots), ",".join(f"{name}={value}" for name, value in self.recipe.items())


RATES = (0.001, 0.004, 0.015)
CHOICES = (
    *(
        Choice(method, 4, lr, n)
        for method, n in (("coop", 16), ("vpt-deep", 8), ("maple", 2), ("dcp", 4))
        for lr in RATES
    ),
    *(Choice(method, 4, 0.008, n) for method, n in (("coop", 16), ("vpt-deep", 16), ("maple", 4), ("dcp", 16))),
    *(Choice("dcp", shots, 0.004, 16) for shots in (4, 16)),
    Choice("dcp", 16, 0.004, 4),
    Choice("dcp", 16, 0.008, 16),
    *(Choice("dcp", 8, lr, 16) for lr in (0.002, 0.004)),
    Choice("dcp", 4, 0.008, 16, {"shared": False}),
    Choice("dcp", 16, 0.004, 16, {"shared": False}),
)


def main(data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")]) -> None:
    """Measure every choice that `results/tuning.csv` does not have yet."""
    known = {row[:3] for row in _rows()}
    split = load_split("caltech101", data_root)
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not known:
            writer.writerow(COLUMNS)
        for choice in CHOICES:
            if choice.key not in known:
                row = (*choice.key, *accuracies(choice, split))
                writer.writerow(row)
                file.flush()
                say(" ".join(map(str, row)))


def _rows() -> list[tuple[str, ...]]:
    """The rows that are there, as text."""
    if not RESULTS.is_file():
        return []
    with RESULTS.open() as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def accuracies(choice: Choice, split: Split) -> list[float]:
    """Top-1 in percent on the validation images, and on the training images themselves."""
    clip = plain_clip("dcp_mini")
    trial = Trial("few-shot", "dcp_mini", choice.method, split.name, choice.shots, SEED)
    recipe = default_of(trial).updated(choice.recipe)
    train = image_source(clip, few_shot(split, choice.shots, SEED).train, recipe.augment, progress=progress_bar)
    template = find_spec(split.name).template
    task = Task(clip, "dcp_mini", split.classnames, template, train, None, recipe, seed=SEED, progress=progress_bar)
    classifier = METHODS[choice.method].fit(task)
    images = list(split.val)
    random.Random(0).shuffle(images)
    validation = image_source(clip, images[:VALIDATION_IMAGES], progress=progress_bar)
    return [top1(classifier.logits(source), source.labels) for source in (validation, task.plain_train)]


if __name__ == "__main__":
    typer.run(main)
