"""Does the miniature behave like CLIP? `python hub/recipes/miniature/compare_clip.py --help`."""

import csv
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.data import few_shot, load_split
from dcp_zoo.methods.base import frozen_features, plain_clip
from dcp_zoo.methods.linear_probe import DEFAULT_C, regression
from dcp_zoo.model.classifier import class_means, gaussian_discriminant
from dcp_zoo.training.sources import image_source

SHOTS, SEED = (1, 2, 4, 8, 16), 1
BETA = 5.5  # of Tip-Adapter's code on ImageNet
Features = tuple[Tensor, Tensor]  # (n, E), unit length, and labels (n,)


def main(
    clip_features: Annotated[Path, typer.Option(help=".npz: test_vector, test_label, trainK_vector, trainK_label.")],
    data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")],
    csv_file: Annotated[Path, typer.Option("--csv", help="Output file.")],
) -> None:
    """Compare the bundled miniature with CLIP ViT-B/32 on Caltech-101: how alike their features of the test images
    are, and what few-shot methods without text make of both. Test images in the split's order, training images of
    seed 1; CLIP's are means over augmented views, the miniature's over an image and its mirror image.
    """
    real = {part: load(np.load(clip_features), part) for part in ("test", *(f"train{k}" for k in SHOTS))}
    mini = miniature_features(data_root)
    if not torch.equal(real["test"][1], mini["test"][1]):
        raise typer.BadParameter("The labels of the test images differ: another split or another order.")
    rows = [("centred kernel alignment, test features", "", "", alignment(real["test"][0], mini["test"][0]))]
    tables = [similarities(*features["test"]) for features in (real, mini)]
    rows += [("correlation of class similarities", "", "", np.corrcoef(*tables)[0, 1])]
    for k in SHOTS:
        for method, fit in METHODS.items():
            scores = [accuracy(fit(*features[f"train{k}"]), *features["test"]) for features in (real, mini)]
            rows.append((f"{method}, {k} images per class, top-1 %", *scores, ""))
    with csv_file.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("what", "CLIP ViT-B/32", "dcp_mini", "agreement"))
        for row in rows:
            writer.writerow([round(cell, 3) if isinstance(cell, float) else cell for cell in row])


def load(arrays: dict[str, np.ndarray], part: str) -> Features:
    vectors = torch.from_numpy(arrays[f"{part}_vector"].astype(np.float32))
    return F.normalize(vectors, dim=1), torch.from_numpy(arrays[f"{part}_label"].astype(np.int64))


def miniature_features(data_root: Path) -> dict[str, Features]:
    clip, split = plain_clip("dcp_mini"), load_split("caltech101", data_root)
    sources = {"test": image_source(clip, split.test)}
    sources |= {f"train{k}": image_source(clip, few_shot(split, k, SEED).train, "flip") for k in SHOTS}
    return {
        part: (F.normalize(frozen_features(clip, source).mean(0), dim=1), source.labels)
        for part, source in sources.items()
    }


def alignment(x: Tensor, y: Tensor) -> float:
    """Linear CKA (Kornblith et al., ICML 2019) of features (n, D) and (n, E) of the same images."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def similarities(features: Tensor, labels: Tensor) -> np.ndarray:
    """Cosines of all pairs of centred class means, C (C - 1) / 2."""
    means = class_means(features, labels, int(labels.max()) + 1)
    means = F.normalize(means - means.mean(0), dim=1)
    return (means @ means.T).numpy()[np.triu_indices(len(means), 1)]


def linear_probe(features: Tensor, labels: Tensor):
    fitted = regression(features, labels, DEFAULT_C, 1000)
    return lambda test: torch.from_numpy(fitted.decision_function(test.numpy()))


def gaussian(features: Tensor, labels: Tensor):
    weight, bias = gaussian_discriminant(features, labels, int(labels.max()) + 1)
    return lambda test: test @ weight.T + bias


def tip_cache(features: Tensor, labels: Tensor):
    values = F.one_hot(labels).float()
    return lambda test: (-BETA * (1 - test @ features.T)).exp() @ values


METHODS = {"linear probe": linear_probe, "GDA without text": gaussian, "Tip-Adapter's cache": tip_cache}


def accuracy(classifier, test: Tensor, labels: Tensor) -> float:
    return 100 * (classifier(test).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    typer.run(main)
