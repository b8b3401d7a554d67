"""The paper's coupling against the released code's, by the authors' recipe, without a text probe, on the same images.

    python benchmarks/couplings.py --data-root DATA         writes results/couplings.csv; resumes when repeated

Of the sets of `sets.py`, PACS photographs chose recipes, the others report. Images and test images are drawn as in
`many_sets.py`. Every trained head is tested with the statistics that are stored after training, and with those of each
batch of 16 test images.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from growing import GrowingTable
from many_sets import MODEL, RESULTS, draw
from sets import SETS

from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import Split
from dcp_zoo.training.evaluation import predict, top1
from dcp_zoo.training.methods import fit_head
from dcp_zoo.training.run import plan
from dcp_zoo.training.sources import image_source
from dcp_zoo.zoo.build import plain_clip

COLUMNS = "weights set shots seed coupling stats top1 images".split()
SHOTS = {"PACS, photos": 4, "EuroSAT": 2, "groceries": 2}
BATCH = 16


def measured(split: Split, recipe: str, seed: int) -> Iterator[tuple[Any, ...]]:
    """Coupling, statistics, top-1 in percent and the number of test images, for both statistics."""
    split = Split(split.name, split.classnames, split.train, [], split.test)
    run = plan(split, MODEL, "dcp", seed=seed, recipe=recipe, device="cpu")
    head: Any = fit_head("dcp", run.task(split, plain_clip(MODEL)))
    test = image_source(plain_clip(MODEL), split.test, progress=progress_bar)
    for stats in ("stored", "batch"):
        head.stats = stats
        logits = predict(head, test, BATCH)
        yield head.config.coupling, stats, round(top1(logits, test.labels), 2), len(logits)


def main(data_root: Annotated[Path, typer.Option(help="Folder with the sets, see sets.py.")], seeds: int = 5) -> None:
    """Train and test with every set, seed and coupling that the table does not have for the current weights yet."""
    table, weights = GrowingTable(RESULTS / "couplings.csv", COLUMNS, COLUMNS[:5]), weights_id(MODEL)
    couplings = {"paper": "bidirectional", "release": "text_to_vision"}
    with TemporaryDirectory() as folder:
        pools = {name: SETS[name](data_root, Path(folder)) for name in SHOTS}
        for name, seed, (recipe, coupling) in product(SHOTS, range(1, seeds + 1), couplings.items()):
            key = weights, name, SHOTS[name], seed
            if (*key, coupling) not in table:
                split = draw(pools[name], SHOTS[name], seed)
                table.add([(*key, *row) for row in measured(split, recipe, seed)])


if __name__ == "__main__":
    typer.run(main)
