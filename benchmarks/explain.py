"""Whether `dcp_zoo.explain` points at what a logit depends on: the part of an image that it names is hidden.

    python benchmarks/explain.py DATA FEATURES      writes results/explain.csv; resumes when repeated

DATA: see `sets.py`; FEATURES is what `baselines.py features` writes. For each reporting set a text probe of
four images per class explains test images. One of nine squares is hidden at a time behind the image's mean
colour: that with the largest share, and the others. What falls is the logit of the predicted class, after
the gate, less the mean logit.
"""

import random
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import typer
from baselines import Known
from growing import GrowingTable
from many_sets import MODEL, RESULTS, TEST_IMAGES
from reads import METHOD, READINGS, task
from sets import REPORTING
from torch import Tensor

import dcp_zoo
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data.images import load_image
from dcp_zoo.heads.head import Head
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.methods import fit_head
from dcp_zoo.zoo.build import plain_clip

SHOTS = 4
IMAGES = 30
ROWS = 3
COLUMNS = "weights set images fall_named fall_elsewhere named_falls_more cpu_seconds".split()


def head_of(known: Known) -> Head:
    """Zero-shot CLIP with the text probe of a draw of training images."""
    given: Any = fit_head(METHOD, task(known, known.drawn(SHOTS, 1)))
    head = LinearHead(plain_clip(MODEL), known.names, *given.method_linear()).eval()
    head.text_probe = given.text_probe
    return head


def squares(size: int) -> list[tuple[slice, ...]]:
    return [*product([slice(size * i // ROWS, size * (i + 1) // ROWS) for i in range(ROWS)], repeat=2)]


@torch.inference_mode()
def falls(head: Head, pixels: Tensor, label: int) -> Tensor:
    """How much the logit falls (9,) if a square of an image (3, H, W) is hidden."""
    hidden = pixels.repeat(1 + ROWS**2, 1, 1, 1)
    for image, (rows, columns) in zip(hidden[1:], squares(pixels.shape[-1]), strict=True):
        image[:, rows, columns] = pixels.mean((1, 2))[:, None, None]
    logits = head(hidden)
    found = logits[:, label] - logits.mean(1)
    return found[0] - found[1:]


def main(data: Path, features: Path) -> None:
    """Measure what the table does not have for the current weights yet."""
    table = GrowingTable(RESULTS / "explain.csv", COLUMNS, COLUMNS[:2])
    weights = weights_id(MODEL)
    for name, make in REPORTING.items():
        if (weights, name) in table:
            continue
        found = []
        seconds = 0.0
        with TemporaryDirectory() as folder:
            names, _, test = make(data, Path(folder))
            head = head_of(Known(features / f"{name}.npz", READINGS["embedding, backbone, inside"]))
            transform = dcp_zoo.create_transform(head)
            for item in random.Random(0).sample(test, min(TEST_IMAGES, len(test)))[:IMAGES]:
                image = load_image(item.path)
                started = time.process_time()
                explained = dcp_zoo.explain(head, image)
                seconds += time.process_time() - started
                shares = torch.tensor([explained.shares[square].sum() for square in squares(len(explained.shares))])
                fall = falls(head, transform(image), names.index(explained.name))
                named = fall[shares.argmax()]
                found.append((named, (fall.sum() - named) / (len(fall) - 1)))
        at, elsewhere = map(torch.stack, zip(*found, strict=True))
        means = (round(each.mean().item(), 3) for each in (at, elsewhere, 100 * (at > elsewhere).float()))
        table.add([(weights, name, len(found), *means, round(seconds / len(found), 2))])


if __name__ == "__main__":
    typer.run(main)
