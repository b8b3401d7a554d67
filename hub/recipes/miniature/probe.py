"""Where in its image tower does a miniature lose what a linear probe can read? `probe.py --help`."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone import MINI_CFG
from dcp_zoo.backbone.mini import build_mini_clip
from dcp_zoo.data import Item, Split, few_shot, load_split
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.zoo.build import plain_clip

SHOTS = 16
MAX_ITER = 1000
CS = [10 ** (exponent / 2) for exponent in range(-1, 10)]
COLUMNS = ("weights", "features", "width", "seed", "C", "top1_few_shot_validation", "top1_validation", "top1_test")
Features = dict[str, Tensor]  # of images (n, width), by the place in the tower


def main(
    weights: Annotated[list[Path], typer.Argument(help="Files of weights of the miniature.")],
    data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")],
    csv_file: Annotated[Path, typer.Option("--csv", help="Output file.")],
    seeds: Annotated[int, typer.Option(help="Draws of training images for the tower's output: 1 to this number.")] = 10,
    inner_seeds: Annotated[int, typer.Option(help="The same for the features inside the tower.")] = 3,
) -> None:
    """Linear probe with 16 images per class of Caltech-101, at four places of the image tower."""
    split = load_split("caltech101", data_root)
    with csv_file.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for path in weights:
            parts = {name: tower_features(path, getattr(split, name)) for name in ("train", "val", "test")}
            for place, test in parts["test"].items():
                features = {name: part[place] for name, part in parts.items()}
                for seed in range(1, 1 + (seeds if place == "output" else inner_seeds)):
                    head = path.stem, place, test.shape[1], seed
                    table.writerows((*head, *row) for row in probed(split, features, seed))
                    file.flush()


@torch.inference_mode()
def tower_features(path: Path, items: list[Item]) -> Features:
    """Normalised features of images: of the stem and of the patch embedding, both averaged over patches, of
    the class token that the projection reads, and of the tower's output."""
    clip = build_mini_clip(path, MINI_CFG | {"embed_dim": load_file(path)["visual.proj"].shape[1]}).eval()
    tower: Any = clip.visual
    read: list[Tensor] = []
    tower.ln_post.register_forward_hook(lambda module, inputs, output: read.append(output))
    plain = plain_clip("dcp_mini")
    found = []
    for images, _ in ImageLoader(Photos(items), FeatureExtractor(plain)).in_order(64):
        stem = tower.conv1.stem(images.x)
        output = tower(images.x)
        token = read.pop()
        places = {
            "stem": stem.mean((2, 3)),
            "patch embedding": tower.conv1.proj(stem).mean((2, 3)),
            "class token": token if token.ndim == 2 else token[:, 0],
            "output": output,
        }
        found.append({place: F.normalize(x, dim=1) for place, x in places.items()})
    return {place: torch.cat([chunk[place] for chunk in found]) for place in found[0]}


def probed(split: Split, features: dict[str, Tensor], seed: int) -> Iterator[tuple[float, ...]]:
    """C and accuracies in percent, see `COLUMNS`."""
    labels = {name: torch.tensor([item.label for item in getattr(split, name)]) for name in features}
    drawn = few_shot(split, SHOTS, seed)
    train, val = (positions(getattr(split, name), getattr(drawn, name)) for name in ("train", "val"))
    for c in CS:
        fit = LogisticRegression(C=c, max_iter=MAX_ITER).fit(features["train"][train], labels["train"][train])
        right = {
            name: torch.from_numpy(fit.predict(features[name].numpy())) == labels[name] for name in ("val", "test")
        }
        shares = (100 * x.double().mean().item() for x in (right["val"][val], right["val"], right["test"]))
        yield round(c, 3), *(round(share, 2) for share in shares)


def positions(items: list[Item], drawn: list[Item]) -> Tensor:
    index = {item.key: i for i, item in enumerate(items)}
    return torch.tensor([index[item.key] for item in drawn])


if __name__ == "__main__":
    typer.run(main)
