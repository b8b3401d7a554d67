"""What reading more than CLIP's embedding is worth: the text probe on the embedding, beside the stem, with the inside
of the stem, and rejection.

    python benchmarks/reads.py FEATURES      writes results/reads.csv; resumes when repeated

FEATURES is what `baselines.py features` writes: all that the miniature says of each reporting set of `sets.py`. Of
each class so many images are drawn at random, five times. AUROC is that of test images of every second class against
the others', by a probe that was fitted to every second class; of two draws.
"""

import random
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from growing import GrowingTable
from many_sets import MODEL, RESULTS
from sets import REPORTING
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.probe import ReadingFeatures, fit_on_features
from dcp_zoo.training.evaluation import expected_calibration_error, top1

IMAGES, DRAWS, REJECTED = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5), (1, 2)
COLUMNS = "weights set classes images_per_class seed reading cpu_seconds top1 nll ece auroc_near".split()
INSIDE = "stage"
READINGS = {
    "embedding": ("x",),
    "embedding and backbone": ("x", "stem"),
    "embedding, backbone, inside": ("x", "stem", INSIDE),
}


class Known:
    """A set's features by one reading: parts one after the other, in which every part has the length 1."""

    def __init__(self, file: Path, parts: tuple[str, ...]) -> None:
        arrays = {name: torch.from_numpy(array) for name, array in np.load(file).items() if array.dtype.kind in "fi"}
        self.widths = tuple(arrays[f"test_{part}"].shape[-1] for part in parts)
        self.train, self.test = (torch.cat([arrays[f"{of}_{part}"] for part in parts], -1) for of in ("train", "test"))
        self.inside = int(INSIDE in parts)
        self.labels, self.truth, self.text = arrays["train_labels"], arrays["test_labels"], arrays["text_weight"]

    def answers(self, rows: list[int], classes: list[int]) -> tuple[Tensor, Tensor]:
        """Logits and distances of all test images, by a probe for these classes on these training images."""
        text = self.text[classes], torch.zeros(len(classes))
        labels = torch.tensor([classes.index(label) for label in self.labels[rows].tolist()])
        named = [str(label) for label in classes]
        reading = ReadingFeatures(self.train[:, rows], text, self.widths, self.inside)
        probe, _ = fit_on_features(named, labels, [reading])
        f, start = self.test[0] / len(self.widths) ** 0.5, F.linear(self.test[0, :, : self.widths[0]], *text)
        return probe(start, f, named), probe.distance(f, named)


def drawn(labels: Tensor, images: int, seed: int) -> list[int]:
    """Positions of so many images of each class."""
    rng, of_each = random.Random(1000 * seed + images), ((labels == label).nonzero() for label in labels.unique())
    return [i for rows in of_each for i in rng.sample(rows.flatten().tolist(), min(images, len(rows)))]


def measured(own: Known, images: int, seed: int) -> dict[str, Any]:
    rows, started = drawn(own.labels, images, seed), time.process_time()
    logits, _ = own.answers(rows, list(range(len(own.text))))
    found: dict[str, Any] = {"cpu_seconds": round(time.process_time() - started, 2)}
    found |= {"top1": round(top1(logits, own.truth), 2), "nll": round(F.cross_entropy(logits, own.truth).item(), 4)}
    found["ece"] = round(expected_calibration_error(logits, own.truth), 2)
    if images > 1 and seed in REJECTED:
        half = [i for i in rows if own.labels[i] % 2 == 0]
        logits, distances = own.answers(half, list(range(0, len(own.text), 2)))
        scores = in_distribution_score(logits.numpy(), distances.numpy())
        found["auroc_near"] = round(100 * float(roc_auc_score((own.truth % 2 == 0).numpy(), scores)), 1)
    return found


def main(features: Annotated[Path, typer.Argument(help="Folder that baselines.py has written.")]) -> None:
    """Measure what the table does not have for the current weights yet."""
    table, weights = GrowingTable(RESULTS / "reads.csv", COLUMNS, COLUMNS[:6]), weights_id(MODEL)
    for seed, name, (reading, parts) in product(DRAWS, REPORTING, READINGS.items()):
        own = Known(features / f"{name}.npz", parts)
        for images in IMAGES:
            key = weights, name, len(own.text), images, seed, reading
            if key not in table:
                table.add([dict(zip(COLUMNS, key, strict=False)) | measured(own, images, seed)])


if __name__ == "__main__":
    typer.run(main)
