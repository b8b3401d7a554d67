"""Arrange image features of the real CLIP ViT-B/32, as others computed them, for `given_features.py`.

    python benchmarks/real_clip.py arrange CLIP_FOLDER FEATURES
    python benchmarks/given_features.py FEATURES/all --model dcp_vitb32 --methods gda --set text=false
        --datasets caltech101,oxford_flowers,fgvc_aircraft,ucf101 --shots 1,4,16 --output SWEEPS/all
    the same with --methods linear-probe and without --set
    python benchmarks/given_features.py FEATURES/named --model dcp_vitb32 --output SWEEPS/named
    for K in 1 2 4:
        python benchmarks/given_features.py FEATURES/imagenet-K --model dcp_vitb32 --output SWEEPS/imagenet-K
    python benchmarks/real_clip.py join SWEEPS          writes results/real_clip.csv

`all` holds the four datasets without text features, `named` the classes of Caltech-101, SUN397 and Food-101
whose name has a text vector, `imagenet-K` all of ImageNet with K images per class: training images of one
draw, tested on those of the other two. There are no validation images. The text probe was chosen on these
sets, and on validation images with the miniature: here, they are selection sets.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

FILES = {"caltech101": "caltech101", "oxford_flowers": "oxford_flowers", "fgvc": "fgvc_aircraft", "ucf101": "ucf101"}
NAMED = {"sun397_named": "sun397", "food101_named": "food101"}
DRAWS = (1, 2, 4)  # images per class of ImageNet
SAME = 0.999  # cosine of one image's features in two draws
app = typer.Typer()
RESULTS = Path(__file__).parent / "results" / "real_clip.csv"


def named_classes(arrays: dict[str, np.ndarray], text: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the classes whose name has a text vector, "a photo of a X" before "a X", and these
    vectors."""
    vectors = {}
    for name, vector, prompt in zip(text["name"], text["vector"], text["prompt"], strict=True):
        if name.lower() not in vectors or prompt.startswith("a photo"):
            vectors[name.lower()] = vector
    names = [str(name) for name in arrays["classnames"]]
    kept = [i for i, name in enumerate(names) if name.replace("_", " ").lower() in vectors]
    found = {
        "classnames": np.array([names[i] for i in kept]),
        "text_vector": np.stack([vectors[names[i].replace("_", " ").lower()] for i in kept]),
    }
    for key in [key.removesuffix("_label") for key in arrays if key.endswith("_label")]:
        rows = np.isin(arrays[f"{key}_label"], kept)
        found[f"{key}_vector"] = arrays[f"{key}_vector"][rows]
        found[f"{key}_label"] = np.searchsorted(kept, arrays[f"{key}_label"][rows])
    return found


def imagenet(arrays: dict[str, np.ndarray], text: np.ndarray, shots: int) -> dict[str, np.ndarray]:
    """One draw for training, and the images of the others that are not in it for the test."""
    train = unit(arrays[f"draw{shots}_vector"])
    others = [k for k in DRAWS if k != shots]
    test = unit(np.concatenate([arrays[f"draw{k}_vector"] for k in others]))
    labels = np.concatenate([arrays[f"draw{k}_label"] for k in others])
    new = (test @ train.T).max(1) < SAME
    found = {"classnames": arrays["classnames"], "text_vector": text}
    found |= {f"train{shots}_vector": train, f"train{shots}_label": arrays[f"draw{shots}_label"]}
    return found | {"test_vector": test[new], "test_label": labels[new]}


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@app.command()
def arrange(
    clip: Annotated[Path, typer.Argument(help="Folder with caltech101.npz, text_vitb32.npz, ...")],
    output: Annotated[Path, typer.Argument(help="Folder for the features.")],
) -> None:
    """Write the files that `dcp-zoo benchmark` reads."""

    def write(folder: str, dataset: str, arrays: dict[str, np.ndarray]) -> None:
        (output / folder).mkdir(parents=True, exist_ok=True)
        np.savez(output / folder / f"{dataset}.npz", **arrays)

    text = dict(np.load(clip / "text_vitb32.npz"))
    for file, dataset in FILES.items():
        write("all", dataset, dict(np.load(clip / f"{file}.npz")))
    write("named", "caltech101", named_classes(dict(np.load(clip / "caltech101.npz")), text))
    for file, dataset in NAMED.items():
        write("named", dataset, dict(np.load(clip / f"{file}.npz")))
    photo = text["vector"][text["source"] == "clip_lt_v2"]  # "a photo of a ..", in label order
    draws = dict(np.load(clip / "imagenet.npz"))
    for shots in DRAWS:
        write(f"imagenet-{shots}", "imagenet", imagenet(draws, photo, shots))


@app.command()
def join(sweeps: Annotated[Path, typer.Argument(help="Folder with the sweeps.")]) -> None:
    """Write the results of all sweeps into one file."""
    parts = {folder.name: pd.read_csv(folder / "results.csv") for folder in sorted(sweeps.iterdir())}
    used = {"all": "all, without text", "named": "named"}
    rows = pd.concat(part.assign(classes_used=used.get(name, "all")) for name, part in parts.items())
    columns = pd.read_csv(RESULTS, nrows=0).columns
    rows[columns].to_csv(RESULTS, index=False)


if __name__ == "__main__":
    app()
