"""How well heads tell images of none of their classes from those of their classes, with half of the classes hidden.

    python benchmarks/rejection.py --data-root DATA      writes results/rejection.csv; resumes when repeated

DATA holds `caltech-101` in CoOp's layout. A head with all defaults is trained on 50 of its 100 classes, another 50 for
every seed; the test images of these are known, those of the other 50 unknown. As in a folder of one's own there are no
validation images: the threshold comes from the training images. Reference: the maximum softmax probability of zero-shot
CLIP with the names of the same 50 classes.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tuning import GrowingTable, of_class, relabelled, sample

from dcp_zoo.benchmark.trial import weights_id
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import Item, Split, load_split
from dcp_zoo.methods import METHODS
from dcp_zoo.methods.base import EVAL_BATCH, plain_clip
from dcp_zoo.methods.heads import method_task
from dcp_zoo.training.loop import predict
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.training.run import Run, train_head
from dcp_zoo.training.sources import image_source

RESULTS = Path(__file__).parent / "results" / "rejection.csv"
COLUMNS = ("weights", "images_per_class", "seed", "score", "auroc", "fpr95", "accepted_known", "accepted_unknown")
MODEL, CLASSES, SHOTS, SEEDS = "dcp_mini", 50, (4, 16), (1, 2, 3)


def main(data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")]) -> None:
    """Measure every number of images and seed that `results/rejection.csv` does not have for the current weights."""
    table = GrowingTable(RESULTS, COLUMNS, ("weights", "images_per_class", "seed"))
    for seed in SEEDS:
        for shots in SHOTS:
            key = weights_id(MODEL), shots, seed
            if key not in table:
                table.add((*key, *row) for row in measured(data_root, shots, seed))


def measured(data_root: Path, shots: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """A row for each score: AUROC, FPR at 95 % acceptance, and what the head's own threshold accepts, in percent."""
    split, unknown = draw(data_root, shots, seed)
    run = Run(MODEL, split, None, seed, default_recipe(MODEL, split.name), torch.device("cpu"))
    known, others = (image_source(plain_clip(MODEL), x, progress=progress_bar) for x in (split.test, unknown))

    model, _ = train_head(run, None, test=False, progress=progress_bar)
    logits = [predict(x.for_model(model), EVAL_BATCH) for x in (known, others)]
    assert model.classifier is not None
    accepted = [100 * model.classifier.accepts(x).float().mean().item() for x in logits]
    yield "energy of the head", *separation(*(x.logsumexp(-1) for x in logits)), *(round(x, 1) for x in accepted)
    yield "maximum probability of the head", *separation(*(x.softmax(-1).amax(-1) for x in logits)), "", ""

    zero_shot = METHODS["zero-shot"].fit(method_task("zero-shot", run, split, {}, progress_bar))
    text = [zero_shot.logits(x) for x in (known, others)]
    yield "maximum probability of zero-shot", *separation(*(x.softmax(-1).amax(-1) for x in text)), "", ""


def draw(data_root: Path, shots: int, seed: int) -> tuple[Split, list[Item]]:
    """Training and test images of the classes of this seed, and the test images of the others."""
    split = load_split("caltech101", data_root)
    chosen = sorted(random.Random(seed).sample(range(len(split.classnames)), CLASSES))
    train = relabelled(split.train, chosen)
    few = [item for label in range(CLASSES) for item in sample(of_class(train, label), shots, seed)]
    names = [split.classnames[label] for label in chosen]
    unknown = [item for item in split.test if item.label not in chosen]
    return Split("folder", names, few, [], relabelled(split.test, chosen)), unknown


def separation(known: Tensor, unknown: Tensor) -> tuple[float, float]:
    """AUROC of the scores of known and unknown images, and the share of unknown ones above the score that 95 % of the
    known ones have, in percent."""
    labels = torch.cat([torch.ones(len(known)), torch.zeros(len(unknown))])
    auroc = roc_auc_score(labels.numpy(), torch.cat([known, unknown]).numpy())
    return round(100 * float(auroc), 1), round(100 * (unknown >= known.quantile(0.05)).float().mean().item(), 1)


if __name__ == "__main__":
    typer.run(main)
