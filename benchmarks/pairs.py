"""Two real encoders of the same images, alone and joined: OpenAI's ViT-B/32 and RN50, without text.

    python benchmarks/pairs.py CLIP      writes results/pairs.csv

CLIP holds `pair_*.npz` with both encoders' vectors of the same images: `vitb32`, `rn50` and `labels`. Of each
class so many images are drawn at random, three times; all others are classified.
"""

import random
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.classes import Class
from dcp_zoo.model.clip import joined
from dcp_zoo.model.text_probe import ReadingFeatures, fit_on_features
from dcp_zoo.training.evaluation import top1

RESULTS = Path(__file__).parent / "results" / "pairs.csv"
DRAWS, IMAGES = (1, 2, 3), (1, 2, 4)
ENCODERS = {"ViT-B/32": ("vitb32",), "RN50": ("rn50",), "joined": ("vitb32", "rn50")}


def drawn(labels: Tensor, images: int, seed: int) -> Tensor:
    """Positions of so many images of each class."""
    rng = random.Random(seed)
    return torch.tensor(
        [i for c in labels.unique() for i in rng.sample((labels == c).nonzero().flatten().tolist(), images)]
    )


def accuracy(vectors: list[Tensor], labels: Tensor, train: Tensor) -> float:
    """Top-1 of a text probe that reads these encoders (n, E), of which none knows a text, on the other images."""
    classes = int(labels.max()) + 1
    silent = torch.zeros(classes, vectors[0].shape[1]), torch.zeros(classes)
    readings = [ReadingFeatures(x[None, train], None if i else silent) for i, x in enumerate(vectors)]
    probe, _ = fit_on_features([Class(str(c)) for c in range(classes)], labels[train], readings)
    test = torch.ones(len(labels), dtype=torch.bool)
    test[train] = False
    f = joined([x[test] for x in vectors], len(vectors))
    return top1(probe(torch.zeros(len(f), classes), f, probe.classes), labels[test])


def main(clip: Annotated[Path, typer.Argument(help="Folder with the pairs.")]) -> None:
    """Measure and write the table."""
    rows = []
    for path in sorted(clip.glob("pair_*.npz")):
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in ("vitb32", "rn50", "labels")}
        arrays = {name: F.normalize(x.float(), dim=-1) if x.ndim > 1 else x for name, x in arrays.items()}
        smallest = int(torch.bincount(arrays["labels"]).min())
        for images in [n for n in IMAGES if n < smallest]:
            for seed in DRAWS:
                train = drawn(arrays["labels"], images, seed)
                for name, parts in ENCODERS.items():
                    value = accuracy([arrays[part] for part in parts], arrays["labels"], train)
                    row = {"set": path.stem.removeprefix("pair_"), "images_per_class": images, "seed": seed}
                    rows.append(row | {"encoder": name, "top1": round(value, 2)})
                    print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(RESULTS, index=False)
    means = pd.DataFrame(rows).groupby(["set", "encoder", "images_per_class"]).top1.mean().unstack()
    print(means.round(1).to_string())


if __name__ == "__main__":
    typer.run(main)
