"""Train the bundled heads and write them into the package; to be run after the miniature has changed.

    python hub/bundle_heads.py --data-root DATA

DATA holds `caltech-101` in CoOp's layout, `pacs/photo` with one folder per class, and of EuroSAT and Oxford Flowers the
parts that `images.parquet` in `eurosat` and `oxford_flowers` holds (columns image, label, file, use). Each head is
trained as by `dcp-zoo train`; its hash and measured accuracy are written to the manifest.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer

from dcp_zoo.cli.console import log, progress_bar
from dcp_zoo.data import Item, Split, load_for_training
from dcp_zoo.files import sha256_of
from dcp_zoo.model.checkpoint import WEIGHTS_NAME
from dcp_zoo.model.config import read_config
from dcp_zoo.training.planning import Run, plan
from dcp_zoo.training.run import RunOptions, train_head
from dcp_zoo.zoo.registry import MANIFEST, WEIGHTS

LICENSE = "apache-2.0"
SHOTS = (1, 4, 8, 16)  # of Caltech-101
PARTS = ("eurosat", "oxford_flowers")  # datasets of which a part is at hand


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with caltech-101 and pacs.")],
    only: Annotated[str, typer.Option(help="Only heads whose name contains this.")] = "",
    trained: Annotated[
        Path | None, typer.Option(help="The heads folder that `hub/build.py` filled; heads that it lacks are trained.")
    ] = None,
) -> None:
    """Train and bundle dcp_mini's heads: Caltech-101 at 1 to 16 shots, PACS photo, EuroSAT, flowers at 16; seed 1."""
    with tempfile.TemporaryDirectory() as images:
        for run in planned(data_root, Path(images)):
            name = f"{run.model}.{run.split.name}-{run.shots}shot"
            if only in name:
                log(name)
                built = trained and trained / name
                bundle(run, name, built if built and built.is_dir() else None)


def planned(data_root: Path, images: Path) -> list[Run]:
    """The runs whose heads are bundled; the parts of datasets are unpacked into the folder `images`."""
    splits = [(load_for_training("caltech101", data_root), shots) for shots in SHOTS]
    splits += [(load_for_training("pacs_photo", data_root), 16)]
    splits += [(unpacked(name, data_root / name / "images.parquet", images / name), 16) for name in PARTS]
    return [plan(split, "dcp_mini", shots=shots, seed=1) for split, shots in splits]


def unpacked(name: str, table: Path, images: Path) -> Split:
    """The images of a table as a split; they are written to the folder `images`."""
    rows = pq.read_table(table).to_pylist()
    names = sorted({row["label"] for row in rows})
    split = Split(name, names, [], [], [])
    for row in rows:
        path = images / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"])
        getattr(split, row["use"]).append(Item(str(path), row["file"], names.index(row["label"])))
    return split


def bundle(run: Run, name: str, trained: Path | None) -> None:
    """Copy one head into the package, from `trained` or after training it, and add it to the manifest."""
    with tempfile.TemporaryDirectory() as folder:
        if trained is None:
            train_head(run, Path(folder), RunOptions(overwrite=True, progress=progress_bar, log=log))
        target = WEIGHTS / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(trained or folder, target, ignore=shutil.ignore_patterns("log.csv"))
    metrics = read_config(target)["dcp"]["metrics"]
    sha256 = sha256_of(target / WEIGHTS_NAME)
    manifest = json.loads(MANIFEST.read_text())
    manifest[name] = {"status": "bundled", "sha256": sha256, "license": LICENSE, "metrics": metrics}
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
