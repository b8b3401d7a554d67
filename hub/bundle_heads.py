"""Train the bundled heads and write them into the package; to be run after the miniature has changed.

    python hub/bundle_heads.py --data-root DATA

DATA holds `caltech-101` in CoOp's layout, `pacs/photo` with one folder per class, and the images of
`eurosat_small` and `oxford_flowers50` in `eurosat/images.parquet` and `oxford_flowers/images.parquet`
(columns image, file). Each head is trained as by `dcp-zoo train`; its hash and measured accuracy are written
to the manifest.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer
from safetensors.torch import save_file

from dcp_zoo.cli.console import log, progress_bar
from dcp_zoo.data import Item, find_spec, load_for_training
from dcp_zoo.data.packaged import everyday_file, everyday_pictures
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.photos import Photos
from dcp_zoo.files import sha256_of
from dcp_zoo.heads.config import WEIGHTS_NAME, read_config
from dcp_zoo.training.methods.text_probe import origin
from dcp_zoo.training.run import Run, RunOptions, plan, train_head
from dcp_zoo.zoo.build import plain_clip
from dcp_zoo.zoo.registry import MANIFEST, WEIGHTS

LICENSE = "apache-2.0"
SHOTS = (1, 4, 8, 16)  # of Caltech-101
PARTS = ("eurosat_small", "oxford_flowers50")  # of datasets that are not at hand as a whole


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with caltech-101 and pacs.")],
    only: Annotated[str, typer.Option(help="Only heads whose name contains this.")] = "",
    trained: Annotated[
        Path | None, typer.Option(help="The heads folder that `hub/build.py` filled; heads that it lacks are trained.")
    ] = None,
) -> None:
    """Train and bundle dcp_mini's heads: Caltech-101 at 1 to 16 shots, PACS photo, EuroSAT, flowers at 16;
    seed 1."""
    bundle_everyday()
    with tempfile.TemporaryDirectory() as images:
        for run in planned(data_root, Path(images)):
            name = f"{run.model}.{run.split.name}-{run.shots}shot"
            if only in name:
                log(name)
                built = trained and trained / name
                bundle(run, name, built if built and built.is_dir() else None)


def bundle_everyday() -> None:
    """Write the miniature's features of the everyday pictures, which no training needs to compute then."""
    clip = plain_clip("dcp_mini")
    table = FeatureExtractor(clip)(Photos([Item(picture, "", 0) for picture in everyday_pictures()]))
    save_file({"features": table.rows()[0].half()}, everyday_file(clip.architecture), origin(clip))


def planned(data_root: Path, images: Path) -> list[Run]:
    """The runs whose heads are bundled; the parts of datasets are unpacked into the folder `images`."""
    splits = [(load_for_training("caltech101", data_root), shots) for shots in SHOTS]
    splits += [(load_for_training("pacs_photo", data_root), 16)]
    for name in PARTS:
        unpack(data_root, name, images)
        splits.append((load_for_training(name, images), 16))
    return [plan(split, "dcp_mini", shots=shots, seed=1) for split, shots in splits]


def unpack(data_root: Path, name: str, images: Path) -> None:
    """Write the images of a dataset's table in its layout below the folder `images`."""
    spec = find_spec(name)
    assert spec.folder
    for row in pq.read_table(data_root / spec.folder / "images.parquet", columns=["image", "file"]).to_pylist():
        path = images / spec.folder / spec.images / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"])


def bundle(run: Run, name: str, trained: Path | None) -> None:
    """Copy one head into the package, from `trained` or after training it, and add it to the manifest."""
    with tempfile.TemporaryDirectory() as folder:
        if trained is None:
            train_head(run, Path(folder), RunOptions(overwrite=True, progress=progress_bar, log=log))
        target = WEIGHTS / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(trained or folder, target)
    metrics = read_config(target)["dcp"]["metrics"]
    sha256 = sha256_of(target / WEIGHTS_NAME)
    manifest = json.loads(MANIFEST.read_text())
    manifest[name] = {"status": "bundled", "sha256": sha256, "license": LICENSE, "metrics": metrics}
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
