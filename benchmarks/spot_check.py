"""What the labels of a few images, chosen as `eval --label` chooses them, say of a head on a folder: how often
the 95 % interval holds the accuracy on all images, and how many labels of random images tell as much.

    python benchmarks/spot_check.py --data-root DATA      writes results/spot_check.csv; resumes when repeated

DATA is as in `sets.py`. A head is trained on one draw of a set and asked about the set's test images, at most
40 of a class; one of PACS also about those of the other styles. Of the latter's photographs, paintings and
cartoons, and of Caltech-101, the constants of `dcp_zoo.inspection.spot_check` were chosen. Of each head and
number of labels `CHOICES` random choices are drawn; all shares are in percent. `width` is the mean width of
the interval and `random_width` that of Wilson's of as many random images, `saved` how many random labels have
the variance of one that is chosen: the ratio of the mean squared errors.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from growing import GrowingTable
from many_sets import draw
from sets import CHOOSING, REPORTING, Pool
from told import MODEL
from worth import OTHERS, TRAINED, some

from dcp_zoo.accuracy import wilson
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Item, Split
from dcp_zoo.features.cache import kept_features
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.fields import Values
from dcp_zoo.heads.head import Head
from dcp_zoo.inspection.spot_check import choose, share_of_all
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.progress import no_progress
from dcp_zoo.training.evaluation import EVAL_BATCH
from dcp_zoo.training.run import RunOptions, plan, train_head

RESULTS = Path(__file__).parent / "results" / "spot_check.csv"
KEY = ("weights", "set", "asked_about", "images_per_class", "labels")
COLUMNS = (*KEY, "images", "top1", "coverage", "width", "random_coverage", "random_width", "saved")
IMAGES = (4, 16)
LABELS = (12, 30, 60)
CHOICES = 300
ROUNDING = 1e-9  # of an interval that ends at 100 %


def trained(pool: Pool, images: int) -> Head:
    """A text probe on one draw."""
    names, train, test = pool
    drawn = draw((names, some(train, len(names), TRAINED), test), images, 1)
    run = plan(Split("folder", names, drawn.train), MODEL, "text-probe", seed=1, device="cpu", describes=False)
    head, _ = train_head(run, None, RunOptions(progress=no_progress), by_folds=True)
    return head


def answers(head: Head, items: list[Item]) -> tuple[np.ndarray, np.ndarray]:
    """How sure a head is of each image (n,), and whether it is right."""
    loader = ImageLoader(Photos(items), FeatureExtractor(head.frozen))
    outputs = outputs_of_loader(head, loader, EVAL_BATCH)
    return outputs.probabilities.max(1), outputs.logits.argmax(1) == loader.labels.numpy()


def measured(confidence: np.ndarray, right: np.ndarray, labels: int) -> Values:
    """The row of one number of labels."""
    truth = 100 * right.mean()
    images = len(right)
    rng = np.random.default_rng(0)
    found = []
    for seed in range(CHOICES):
        chosen, strata = choose(confidence, labels, seed)
        share = share_of_all(np.bincount(strata), strata[chosen], right[chosen])
        at_random = right[rng.choice(images, labels, replace=False)].mean()
        low, high = wilson(at_random, labels * (images - 1) / (images - labels))
        found.append(
            (
                share.low - ROUNDING <= truth <= share.high + ROUNDING,
                share.high - share.low,
                low - ROUNDING <= truth <= high + ROUNDING,
                high - low,
                (share.percent - truth) ** 2,
                (100 * at_random - truth) ** 2,
            )
        )
    held, width, random_held, random_width, error, random_error = np.mean(found, 0).tolist()
    row = (truth, 100 * held, width, 100 * random_held, random_width, random_error / max(error, 1e-9))
    rounded = (round(float(value), 2) for value in row)
    return {"images": images} | dict(zip(COLUMNS[len(KEY) + 1 :], rounded, strict=True))


def main(data_root: Annotated[Path, typer.Option(help="Folder with the sets, see sets.py.")]) -> None:
    """Measure what the table does not have for the current weights yet."""
    torch.set_num_threads(1)
    table = GrowingTable(RESULTS, COLUMNS, KEY)
    weights = weights_id(MODEL)
    with TemporaryDirectory() as folder, kept_features():
        pools = {name: image_set(data_root, Path(folder)) for name, image_set in (CHOOSING | REPORTING).items()}
        styles = [name for name in pools if name.startswith("PACS")]
        for name, pool in pools.items():
            asked = styles if name in styles else [name]
            for images in IMAGES:
                left = [about for about in asked if (weights, name, about, images, LABELS[-1]) not in table]
                if not left:
                    continue
                head = trained(pool, images)
                for about in left:
                    others = some(pools[about][2], len(pool[0]), OTHERS)
                    confidence, right = answers(head, others)
                    keys = [(weights, name, about, images, labels) for labels in LABELS]
                    rows = [measured(confidence, right, labels) for labels in LABELS]
                    table.add([dict(zip(KEY, key, strict=True)) | row for key, row in zip(keys, rows, strict=True)])


if __name__ == "__main__":
    typer.run(main)
