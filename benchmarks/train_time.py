"""Processor time of `dcp-zoo train`, from process start to the saved head, on a folder of photographs.

    python benchmarks/train_time.py --data-root DATA      writes results/train_time.csv

DATA holds `pacs` and `caltech-101`. The commands are those of README with all defaults, the test on held-out images
included, on one thread; time is user plus system time of the process and of those it starts.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pandas as pd
import typer

from dcp_zoo.benchmark.trial import weights_id
from dcp_zoo.data import load_split

RESULTS = Path(__file__).parent / "results" / "train_time.csv"
RUNS = {  # dataset, classes, images per class, arguments
    "text-probe": ("pacs_photo", 5, 20, ()),
    "dcp": ("pacs_photo", 5, 20, ("--method", "dcp")),
}


def main(data_root: Annotated[Path, typer.Option(help="Folder with pacs and caltech-101.")]) -> None:
    """Run both commands and write their times."""
    rows = []
    for method, (dataset, classes, images, arguments) in RUNS.items():
        with TemporaryDirectory() as folder:
            photos, head = Path(folder, "MY_PHOTOS"), Path(folder, "my_head")
            write_folder(photos, dataset, classes, images, data_root)
            seconds = processor_seconds("train", str(photos), "--output", str(head), *arguments)
            assert list(head.rglob("*.safetensors"))
        rows.append((weights_id("dcp_mini"), method, dataset, classes, images, round(seconds, 1)))
    columns = ["weights", "method", "dataset", "classes", "images_per_class", "processor_seconds"]
    pd.DataFrame(rows, columns=columns).to_csv(RESULTS, index=False)
    print(RESULTS.read_text(), end="")


def write_folder(folder: Path, dataset: str, classes: int, images: int, data_root: Path) -> None:
    """Links to the first training images of the first classes, a folder per class."""
    split = load_split(dataset, data_root)
    for label, name in enumerate(split.classnames[:classes]):
        (folder / name).mkdir(parents=True)
        for item in [item for item in split.train if item.label == label][:images]:
            (folder / name / Path(item.path).name).symlink_to(Path(item.path).resolve())


def processor_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "dcp_zoo", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    typer.run(main)
