"""Does the miniature behave like CLIP? `python hub/recipes/miniature/compare_clip.py --help`."""

import csv
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from clip_names import read_clip_names
from stem import load_stem
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import few_shot, load_split
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.views import MIRRORED, PLAIN
from dcp_zoo.probe.estimates import class_means
from dcp_zoo.zoo.build import plain_clip

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from real_clip import named_classes

TEMPLATE = "a photo of a {}."
SEED = 1  # of the training images


def main(
    clip_folder: Annotated[Path, typer.Option(help="With caltech101.npz and text_vitb32.npz: CLIP ViT-B/32's.")],
    data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")],
    features: Annotated[Path, typer.Option(help="Folder for the miniature's features, for few-shot methods.")],
    csv_file: Annotated[Path, typer.Option("--csv", help="Output file.")],
    shots: Annotated[str, typer.Option(help="Images per class of these features.")] = "1,2,4,8,16",
) -> None:
    """Compare the bundled miniature with CLIP ViT-B/32 on Caltech-101's test images: their image features,
    and zero-shot accuracy on the classes whose name has one of CLIP's text vectors, and that of the
    miniature's teacher on all classes. Few-shot methods then run on the features of these classes with
    `benchmarks/given_features.py FEATURES --model dcp_mini --datasets caltech101`, as
    `benchmarks/real_clip.py` has them run on CLIP's.
    """
    real, text = (dict(np.load(clip_folder / name)) for name in ("caltech101.npz", "text_vitb32.npz"))
    clip = plain_clip("dcp_mini")
    mini = image_features(clip, data_root, [int(k) for k in shots.split(",")]) | {"classnames": real["classnames"]}
    if not np.array_equal(real["test_label"], mini["test_label"]):
        raise typer.BadParameter("The labels of the test images differ: another split or another order.")
    named = {"CLIP": named_classes(real, text), "dcp_mini": named_classes(mini, text)}
    real_text = unit(named["CLIP"]["text_vector"])
    names = [str(name).replace("_", " ") for name in named["CLIP"]["classnames"]]
    own_text = clip.zero_shot_classifier(names, TEMPLATE)
    features.mkdir(parents=True, exist_ok=True)
    np.savez(features / "caltech101.npz", **named["dcp_mini"] | {"text_vector": own_text.numpy()})
    x = unit(real["test_vector"])
    y = unit(mini["test_vector"])
    labels = torch.from_numpy(real["test_label"].astype(np.int64))
    rows = {
        "linear CKA of the image features": alignment(x, y),
        "correlation of the similarities of class means": np.corrcoef(similar(x, labels), similar(y, labels))[0, 1],
        "correlation of the similarities of class names": np.corrcoef(pairs(real_text), pairs(own_text))[0, 1],
        f"zero-shot, {len(names)} classes, CLIP": accuracy(named["CLIP"], real_text),
        f"zero-shot, {len(names)} classes, dcp_mini": accuracy(named["dcp_mini"], own_text),
        "cosine of an image and its name, CLIP": own_cosine(named["CLIP"], real_text),
        "cosine of an image and its name, dcp_mini": own_cosine(named["dcp_mini"], own_text),
    }
    if own_text.shape == real_text.shape:
        what = f"zero-shot, {len(names)} classes, dcp_mini's images, CLIP's texts"
        rows[what] = accuracy(named["dcp_mini"], real_text)
    rows |= teacher_accuracy(clip, data_root, read_clip_names(clip_folder / "text_vitb32.npz").classes)
    with csv_file.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("what", "value"), *((what, round(value, 3)) for what, value in rows.items())])
    for what, value in rows.items():
        typer.echo(f"{value:8.3f}  {what}")


def image_features(clip: FrozenCLIP, data_root: Path, shots: list[int]) -> dict[str, np.ndarray]:
    """Of the test images, and, averaged over an image and its mirror image, of the training images."""
    split = load_split("caltech101", data_root)
    extract = FeatureExtractor(clip)
    tables = {"test": extract(Photos(split.test))}
    for k in shots:
        tables[f"train{k}"] = extract(Photos(few_shot(split, k, SEED).train), views=(PLAIN, MIRRORED))
    vectors = {part: table.embeddings.rows(*table.views).mean(0) for part, table in tables.items()}
    arrays = {f"{part}_vector": vector.numpy() for part, vector in vectors.items()}
    return arrays | {f"{part}_label": table.labels.numpy() for part, table in tables.items()}


@torch.inference_mode()
def teacher_accuracy(clip: FrozenCLIP, data_root: Path, classes: list[str]) -> dict[str, float]:
    """What the vision tower can learn from its teacher, the classifier of the stem: zero-shot accuracy of
    the teacher's probabilities for ImageNet's classes, as mixtures of the miniature's text features of these
    classes."""
    split = load_split("caltech101", data_root)
    (_, teacher) = load_stem()
    stem: Any = clip.visual.conv1.stem
    batches = ImageLoader(Photos(split.test), FeatureExtractor(clip)).in_order(64)
    probabilities = torch.cat([teacher(stem(images.x).mean((2, 3))).softmax(-1) for images, _ in batches])
    labels = torch.tensor([item.label for item in split.test])
    texts = [clip.zero_shot_classifier(names, TEMPLATE) for names in (classes, split.classnames)]
    found = {}
    for what, mean in (("", torch.zeros(())), (", centred", texts[0].mean(0))):
        known, wanted = (F.normalize(text - mean, dim=1) for text in texts)
        right = (F.normalize(probabilities @ known, dim=1) @ wanted.T).argmax(1) == labels
        found[f"zero-shot, {len(wanted)} classes, teacher's mixtures of texts{what}"] = (
            100 * right.double().mean().item()
        )
    return found


def unit(vectors: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=1)


def alignment(x: Tensor, y: Tensor) -> float:
    """Linear CKA (Kornblith et al., ICML 2019) of features (n, D) and (n, E) of the same images."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def similar(features: Tensor, labels: Tensor) -> np.ndarray:
    return pairs(class_means(features, labels, int(labels.max()) + 1))


def pairs(vectors: Tensor) -> np.ndarray:
    """Cosines of all pairs of centred vectors (C, E): (C (C - 1) / 2,)."""
    vectors = F.normalize(vectors - vectors.mean(0), dim=1)
    return (vectors @ vectors.T).numpy()[np.triu_indices(len(vectors), 1)]


def accuracy(named: dict[str, np.ndarray], text: Tensor) -> float:
    """Top-1 in percent."""
    answers = (unit(named["test_vector"]) @ text.T).argmax(1).numpy()
    return 100 * float((answers == named["test_label"]).mean())


def own_cosine(named: dict[str, np.ndarray], text: Tensor) -> float:
    return (unit(named["test_vector"]) * text[torch.from_numpy(named["test_label"])]).sum(1).mean().item()


if __name__ == "__main__":
    typer.run(main)
