"""What it would be worth to show a model the whole image, in place of CLIP's central square.

    python benchmarks/whole_image.py DATA      writes results/whole_image.csv; resumes when repeated

DATA: see `sets.py`, of which those are measured whose images are not square. The default classifier is
trained on four images per class, and tested, as CLIP crops them, squashed to a square, and padded to one
with grey.
"""

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from growing import GrowingTable
from many_sets import MODEL, RESULTS, draw
from PIL import Image, ImageOps
from sets import SETS

from dcp_zoo import FewShotClassifier
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import Item, load_image

NAMES = ("flowers", "scenes", "groceries")
IMAGES = 4
DRAWS = (1, 2, 3)
COLUMNS = "weights set images_per_class seed shown top1 test_images".split()


def shown(item: Item, how: str) -> Image.Image:
    image = load_image(item.path)
    side = max(image.size)
    if how == "padded":
        return ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, "grey")
    return image.resize((side, side), Image.Resampling.BICUBIC) if how == "squashed" else image


def main(data: Path) -> None:
    """Measure what the table does not have for the current weights yet."""
    table = GrowingTable(RESULTS / "whole_image.csv", COLUMNS, COLUMNS[:5])
    weights = weights_id(MODEL)
    with TemporaryDirectory() as folder:
        pools = {name: SETS[name](data, Path(folder)) for name in NAMES}
        for seed, name, how in product(DRAWS, NAMES, ("cropped", "squashed", "padded")):
            key = (weights, name, IMAGES, seed, how)
            if key in table:
                continue
            split = draw(pools[name], IMAGES, seed)
            model = FewShotClassifier(MODEL)
            model.fit([shown(item, how) for item in split.train], [split.classnames[i.label] for i in split.train])
            truth = [split.classnames[item.label] for item in split.test]
            score = 100 * model.score([shown(item, how) for item in split.test], truth)
            table.add([(*key, round(score, 2), len(truth))])


if __name__ == "__main__":
    typer.run(main)
