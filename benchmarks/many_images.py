"""`dcp-zoo train` on many images: processor time against a bare loop, memory, and what a killed run loses.

    python benchmarks/many_images.py --data-root DATA                  100,000 images of 100 classes
    python benchmarks/many_images.py --data-root DATA --images 5000    a trial

DATA holds `tiny-imagenet-200` (parquet); a class is two of its classes, and each image is there twice, as it is and
mirrored. Three commands train the default head of the miniature on all images: one that is left alone, one with the
features that the first left behind, and one that is killed (SIGKILL) five times and repeated. The bare loop, at the
same time as the first of them, decodes the same images by the same transform and runs the same model in batches of 64,
without keeping anything. Writes results/many_images.csv.
"""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pandas as pd
import psutil
import typer
from PIL import Image, ImageOps
from tuning import tiny_imagenet

RESULTS = Path(__file__).parent / "results" / "many_images.csv"
CLASSES, KILLS = 100, 5
BARE = """
import sys, torch
from pathlib import Path
from dcp_zoo.data import Item
from dcp_zoo.training.sources import ImageSource
from dcp_zoo.zoo.factory import create_transform, plain_clip
torch.set_num_threads(int(sys.argv[2]))
clip = plain_clip("dcp_mini")
items = [Item(str(p), p.name, 0) for p in sorted(Path(sys.argv[1]).glob("*/*"))]
with torch.inference_mode():
    for x, _ in ImageSource(clip, items, create_transform(clip), once=True).batches(64):
        clip.encode_image(x)
"""


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with tiny-imagenet-200.")],
    images: int = 100_000,
    threads: int = 1,
) -> None:
    """Run all commands and write their times."""
    with TemporaryDirectory() as name:
        folder, rows = Path(name), {}
        write_images(folder / "photos", data_root / "tiny-imagenet-200", images)
        train = [sys.executable, "-m", "dcp_zoo", "train", folder / "photos", "--test", "0"]
        own = {"OMP_NUM_THREADS": str(threads)}

        def run(cache: str, output: str, kill_after: float = 1e9) -> dict[str, Any]:
            return watched(
                [*train, "--output", folder / output], own | {"DCP_ZOO_CACHE": str(folder / cache)}, kill_after
            )

        with ThreadPoolExecutor() as pool:  # at the same time, as the load of a machine changes
            bare = pool.submit(watched, [sys.executable, "-c", BARE, folder / "photos", threads], {})
            rows["train"], rows["bare loop"] = run("cache", "head"), bare.result()
        rows["train again"] = run("cache", "again")
        needed, parts = rows["train"]["processor_seconds"], []
        for n in range(KILLS):
            parts.append(run("killed cache", "killed", random.Random(n).uniform(0.1, 0.2) * needed))
        parts.append(run("killed cache", "killed"))
        rows["train, killed five times"] = {key: max(p[key] for p in parts) for key in parts[0]} | {
            key: round(sum(p[key] for p in parts), 1) for key in ("seconds", "processor_seconds")
        }
        heads = [(folder / name / "model.safetensors").read_bytes() for name in ("head", "again", "killed")]
        assert heads[0] == heads[1] == heads[2], "the same head"
    table = pd.DataFrame([{"run": run, "images": images, "threads": threads, **row} for run, row in rows.items()])
    table.to_csv(RESULTS, index=False)
    print(table.to_string(index=False))


def write_images(folder: Path, source: Path, images: int) -> None:
    """Half as many of Tiny ImageNet's training images and their mirror images, in 100 folders."""
    (staging := folder / "all").mkdir(parents=True)
    _, items = tiny_imagenet(range(2 * CLASSES), images // (4 * CLASSES), source, staging)
    for item in items:
        place = folder / f"class_{item.label // 2:03d}" / Path(item.path).name
        place.parent.mkdir(exist_ok=True)
        Path(item.path).rename(place)
        with Image.open(place) as image:
            ImageOps.mirror(image).save(place.with_stem(f"{place.stem}-mirrored"))
    staging.rmdir()


def watched(command: list[Any], environment: dict[str, str], kill_after: float = 1e9) -> dict[str, Any]:
    """Run a command, or kill it after some seconds of processor time: time, processor time, and resident memory in MB,
    after a third of the time and at most."""
    process = subprocess.Popen([str(part) for part in command], env={**os.environ, **environment})
    seen, started, sizes, ended = psutil.Process(process.pid), time.perf_counter(), [0], 0
    while not ended:
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
        with suppress(psutil.Error):  # it has ended
            sizes.append(seen.memory_info().rss >> 20)
            if sum(seen.cpu_times()[:2]) > kill_after:
                process.kill()
        time.sleep(0.2)
    assert status == 0 or kill_after < 1e9
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "mb_after_a_third": sizes[len(sizes) // 3],
        "mb_peak": used.ru_maxrss >> 10,
    }


if __name__ == "__main__":
    typer.run(main)
