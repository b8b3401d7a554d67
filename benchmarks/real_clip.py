"""Arrange image features of the real CLIP ViT-B/32, as others computed them, for `dcp-zoo benchmark --features`.

python benchmarks/real_clip.py CLIP_FOLDER FEATURES
dcp-zoo benchmark few-shot --features FEATURES/all --models dcp_vitb32 --methods gda,linear-probe --set text=false
--datasets caltech101,oxford_flowers,fgvc_aircraft,ucf101 --shots 1,4,16 --seeds 1 --output SWEEP
dcp-zoo benchmark few-shot --features FEATURES/named --models dcp_vitb32 --datasets caltech101 --shots 1,2,4,8,16
--seeds 1 --output SWEEP_NAMED

`all` holds the four datasets without text features, `named` the classes of Caltech-101 whose name has a text vector.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

FILES = {"caltech101": "caltech101", "oxford_flowers": "oxford_flowers", "fgvc": "fgvc_aircraft", "ucf101": "ucf101"}


def named_classes(arrays: dict[str, np.ndarray], text: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the classes whose name has a text vector, "a photo of a X" before "a X", and these vectors."""
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


def main(
    clip: Annotated[Path, typer.Argument(help="Folder with caltech101.npz, fgvc.npz, text_vitb32.npz, ...")],
    output: Annotated[Path, typer.Argument(help="Folder for `all` and `named`.")],
) -> None:
    for part in ("all", "named"):
        (output / part).mkdir(parents=True, exist_ok=True)
    for file, dataset in FILES.items():
        np.savez(output / "all" / f"{dataset}.npz", **np.load(clip / f"{file}.npz"))
    text = dict(np.load(clip / "text_vitb32.npz"))
    found = named_classes(dict(np.load(clip / "caltech101.npz")), text)
    np.savez(output / "named" / "caltech101.npz", **found)
    typer.echo(f"{len(found['classnames'])} classes of Caltech-101 have a text vector.")


if __name__ == "__main__":
    typer.run(main)
