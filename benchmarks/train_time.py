"""Processor time and memory of `dcp-zoo train`, from process start to the saved head, on a folder of
photographs.

    python benchmarks/train_time.py --data-root DATA                        the miniature
    python benchmarks/train_time.py --data-root DATA --model dcp_vitb16     real sizes, with random weights

`--code CHECKOUT` runs the package of another commit. Of real sizes DCP trains for one epoch and
for three, from which the time of all epochs follows.

Each writes its rows into results/train_time.csv, and resumes when repeated. DATA holds `pacs`, of which 5
classes with 20 photographs each are trained on, with all defaults, what tells the accuracy included: four
folds of the text probe, one training more of DCP. Time is user plus system time of the process and of those
it starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from growing import GrowingTable
from speed import cache_clip

from dcp_zoo.data import load_split

RESULTS = Path(__file__).parent / "results" / "train_time.csv"
DATASET = "pacs_photo"
CLASSES = 5
IMAGES = 20
RUNS = {
    "text-probe": (),
    "dcp": ("--method", "dcp"),
}
COLUMNS = "commit model method threads classes images_per_class processor_seconds peak_mb".split()


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with pacs.")],
    model: str = "dcp_mini",
    code: Annotated[Path, typer.Option(help="Checkout whose package runs.")] = Path(__file__).parents[1],
    threads: int = 2,
) -> None:
    """Run the commands and write their times."""
    commit = subprocess.run(
        ["git", "-C", code, "rev-parse", "--short", "HEAD"], capture_output=True, check=True, text=True
    )
    table = GrowingTable(RESULTS, COLUMNS, COLUMNS[:4])
    with TemporaryDirectory() as folder:
        write_folder(Path(folder, "MY_PHOTOS"), data_root)
        if model != "dcp_mini":
            cache_clip(Path(folder, "hub"), model)
        for method in RUNS:
            key = commit.stdout.strip(), model, method, threads
            if key not in table:
                seconds, memory = cost(Path(folder), code, model, method, threads)
                table.add([(*key, CLASSES, IMAGES, round(seconds, 1), memory)])


def cost(folder: Path, code: Path, model: str, method: str, threads: int) -> tuple[float, int]:
    """Processor seconds and peak memory in MB of a run, see above."""
    head = folder / "head"

    def trained(*changes: str) -> tuple[float, int]:
        command = ["train", str(folder / "MY_PHOTOS"), "--model", model, "--output", str(head), "--overwrite"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(code),
            "OMP_NUM_THREADS": str(threads),
            "DCP_ZOO_CACHE": str(folder / f"cache {method} {changes}"),
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
        }
        return measured([*command, *RUNS[method], *changes], environment)

    if model == "dcp_mini" or "dcp" not in method:
        return trained()
    first, memory = trained("--set", "stop_epoch=1")
    per_epoch = (trained("--set", "stop_epoch=3")[0] - first) / 2
    epochs = json.loads((head / "config.json").read_text())["dcp"]["recipe"]["epochs"]
    return first + (epochs - 1) * per_epoch, memory


def write_folder(folder: Path, data_root: Path) -> None:
    """Links to the first training images of the first classes, a folder per class."""
    split = load_split(DATASET, data_root)
    for label, name in enumerate(split.classnames[:CLASSES]):
        (folder / name).mkdir(parents=True)
        for item in [item for item in split.train if item.label == label][:IMAGES]:
            (folder / name / Path(item.path).name).symlink_to(Path(item.path).resolve())


def measured(arguments: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Processor seconds and peak memory in MB of a command."""
    command = [sys.executable, "-P", "-m", "dcp_zoo", *arguments]  # not the package of the current folder
    process = subprocess.Popen(command, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    return used.ru_utime + used.ru_stime, used.ru_maxrss // 1024


if __name__ == "__main__":
    typer.run(main)
