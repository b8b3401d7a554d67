"""What reading more than CLIP's embedding is worth: the text probe on the embedding, beside the stem, with
the inside of the stem, and rejection.

    python benchmarks/reads.py FEATURES      writes results/reads.csv; resumes when repeated

FEATURES is what `baselines.py features` writes; draws and test images are those of `baselines.py`, and the
rows are the text probe's in tables of it. AUROC is that of test images of every second class against the
others', by a probe that was fitted to every second class; of two draws.
"""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from baselines import Known, measured
from growing import GrowingTable
from many_sets import MODEL, RESULTS
from sets import REPORTING
from sklearn.metrics import roc_auc_score

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.backbone.classes import TEMPLATE
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Split
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.training.evaluation import EVAL_BATCH
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.task import Task

IMAGES = (4, 16, 1, 2, 8)
DRAWS = (1, 2, 3, 4, 5)
REJECTED = (1, 2)
COLUMNS = (
    "weights set classes images_per_class seed reading top1 ece nll test_images train_cpu_seconds auroc_near".split()
)
READINGS = {"embedding": "x", "embedding and backbone": "x,stem", "embedding, backbone, inside": "x,stem,stage"}
METHOD = "text-probe"


def task(known: Known, split: Split) -> Task:
    recipe = METHODS[METHOD].recipe(MODEL, "folder", 0, "few-shot")
    return Task(known.clip, MODEL, split.classnames, TEMPLATE, known.images(split.train), None, recipe, 0)


def rejection(known: Known, images: int, seed: int) -> float:
    """AUROC in percent, of a head that knows every second class."""
    train = [item._replace(label=item.label // 2) for item in known.drawn(images, seed).train if item.label % 2 == 0]
    head: Any = fit_head(METHOD, task(known, Split("folder", known.names[::2], train, [], [])))
    outputs = outputs_of_loader(head, known.test, EVAL_BATCH)
    distances = head.distances(torch.from_numpy(outputs.features)).numpy()
    scores = in_distribution_score(outputs.logits, distances)
    return round(100 * float(roc_auc_score((known.test.labels % 2 == 0).numpy(), scores)), 1)


def main(features: Annotated[Path, typer.Argument(help="Folder that baselines.py has written.")]) -> None:
    """Measure what the table does not have for the current weights yet."""
    table = GrowingTable(RESULTS / "reads.csv", COLUMNS, COLUMNS[:6])
    weights = weights_id(MODEL)
    for seed, name, (reading, parts) in product(DRAWS, REPORTING, READINGS.items()):
        known = Known(features / f"{name}.npz", parts)
        for images in IMAGES:
            key = weights, name, len(known.names), images, seed, reading
            if key not in table:
                auroc = rejection(known, images, seed) if images > 1 and seed in REJECTED else ""
                table.add([(*key, *measured(known, images, seed, METHOD), auroc)])


if __name__ == "__main__":
    typer.run(main)
