"""Which of two heads is better, as `eval` with two heads tells it from a few labelled images: how often it
names the better one, the worse one, and one where both are as good.

    python benchmarks/which_head.py FEATURES      writes results/which_head.csv; resumes when repeated

FEATURES is what `baselines.py features` writes. The heads are text probes: of four and of eight images per
class of one draw, and of eight of two draws. What they answer on all test images stands for all images that
there are; labelled images are drawn from these with replacement, `CHOICES` times, each alone or as a burst of
four, in which the heads answer alike. For two heads that are as good, the answers of the two are exchanged at
random, image by image. Where neither is named, `enough` is how often it would be with as many more images as
were told. All but `difference` in percent of the choices.
"""

from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from baselines import Known
from growing import GrowingTable
from many_sets import MODEL, RESULTS
from reads import METHOD, READINGS, task
from sets import REPORTING

from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Item
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.training.comparison import Comparison
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation
from dcp_zoo.training.methods import fit_head

DRAWS = (1, 2, 3)
LABELLED = (50, 100, 200)
BURSTS = (1, 4)  # images of each that is labelled
CHOICES = 200
MOST_MORE = 5_000  # images, beyond which `enough` is not asked
KEY = ("weights", "set", "heads", "draw", "labelled", "of_a_burst")
COLUMNS = (*KEY, "difference", "better", "worse", "false_alarms", "told_more", "enough")


def right_answers(known: Known, images: int, draw: int) -> np.ndarray:
    """Which test images (n,) a head answers correctly."""
    head = fit_head(METHOD, task(known, known.drawn(images, draw)))
    logits = outputs_of_loader(head, known.test, EVAL_BATCH).logits
    return logits.argmax(1) == known.test.labels.numpy()


def compared(first: np.ndarray, second: np.ndarray, of_a_burst: int) -> Comparison:
    """Two heads that are right on these images, of class 0."""
    items = [Item("", f"{i}", 0, group=f"{i}") for i in range(len(first)) for _ in range(of_a_burst)]

    def evaluation(right: np.ndarray) -> Evaluation:
        rows = torch.from_numpy(right.repeat(of_a_burst)).float()
        return Evaluation(["right", "wrong"], items, torch.stack([rows, torch.full_like(rows, 0.5)], 1))

    return Comparison(evaluation(first), evaluation(second))


def measured(first: np.ndarray, second: np.ndarray, labelled: int, of_a_burst: int) -> tuple[float | str, ...]:
    """The difference in points, and how often each head is named."""
    rng = np.random.default_rng(0)
    difference = 100 * float(first.mean() - second.mean())
    named = []
    alarms = []
    told = []
    enough = []
    for _ in range(CHOICES):
        rows = rng.integers(len(first), size=labelled)
        found = compared(first[rows], second[rows], of_a_burst)
        named.append(found.better * np.sign(difference))
        swapped = rng.random(labelled) < 0.5
        one = np.where(swapped, second[rows], first[rows])
        other = np.where(swapped, first[rows], second[rows])
        alarms.append(compared(one, other, of_a_burst).better != 0)
        more = found.more_images
        if found.better == 0 and more is not None and more < MOST_MORE:
            told.append(more)
            again = rng.integers(len(first), size=labelled + more // of_a_burst)
            enough.append(compared(first[again], second[again], of_a_burst).better != 0)
    shares = [np.mean(np.array(named) == 1), np.mean(np.array(named) == -1), np.mean(alarms)]
    asked = [np.median(told), round(100 * np.mean(enough), 2)] if told else ["", ""]
    return round(difference, 2), *(round(100 * float(share), 2) for share in shares), *asked


def main(features: Annotated[Path, typer.Argument(help="Folder that baselines.py has written.")]) -> None:
    """Measure what the table does not have for the current weights yet."""
    torch.set_num_threads(1)
    table = GrowingTable(RESULTS / "which_head.csv", COLUMNS, KEY)
    weights = weights_id(MODEL)
    for draw, name in product(DRAWS, REPORTING):
        known = Known(features / f"{name}.npz", READINGS["embedding, backbone, inside"])
        heads = {"8 and 4 images": ((8, draw), (4, draw)), "8 and 8 images": ((8, draw), (8, draw + 1))}
        for pair, settings in heads.items():
            cells = [(weights, name, pair, draw, *cell) for cell in product(LABELLED, BURSTS)]
            if all(cell in table for cell in cells):
                continue
            right = [right_answers(known, *setting) for setting in settings]
            table.add((*cell, *measured(*right, *cell[4:])) for cell in cells if cell not in table)


if __name__ == "__main__":
    typer.run(main)
