"""`dcp-zoo predict` on many images against a bare loop around ONNX Runtime that decodes in as many processes.

    python benchmarks/bulk.py                     10,000 images; results in results/bulk.csv
    python benchmarks/bulk.py --images 2000 --rounds 3

Every round runs, one after the other and each in a new process: `bare`, a loop with ONNX Runtime's default options;
`bare, passive`, the same with threads that wait without spinning; and `zoo`, the command with a CSV file as output. All
use the same ONNX file, decoding processes, batch size and threads, and their times include the start of the process.
Two more runs of the command, on a quarter and on all of the images, show that its memory does not grow.
"""

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

CSV = Path(__file__).parent / "results" / "bulk.csv"
COLUMNS = ("variant", "round", "images", "workers", "seconds", "images_per_second", "cpu_seconds", "peak_mb")
HEAD = "dcp_mini.caltech101-16shot"
BATCH = 32
SIZE, CROP = (300, 225), 192  # of the images, and of the model's input


def make_images(folder: Path, count: int) -> None:
    """Small JPEGs, about 20 kB each, with coarse and fine structure."""
    random = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"{i // 1000:03}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        noise = random.normal(0, 12, (SIZE[1], SIZE[0], 3))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i:06}.jpg", quality=85)


# -------------------------------------------------------------------------------------------------------- the bare loop


def load(path: str) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    scale = CROP / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
    return np.asarray(image.crop((left, top, left + CROP, top + CROP)))


def bare(folder: Path, onnx: Path, workers: int, threads: int, passive: bool) -> None:
    """What one writes by hand: a pool of processes, batches, and the best class of each image."""
    paths = sorted(str(path) for path in folder.rglob("*.jpg"))
    best: list[int] = []
    batch: list[np.ndarray] = []
    with ProcessPoolExecutor(workers) as pool:
        images = pool.map(load, paths, chunksize=BATCH)  # before the threads of ONNX Runtime exist
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if passive:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])

        def classify() -> None:
            pixels = np.stack(batch).transpose(0, 3, 1, 2)
            best.extend(
                session.run(["logits"], {"pixel_values": (pixels - np.float32(127)) / np.float32(128)})[0].argmax(1)
            )
            batch.clear()

        for image in images:
            batch.append(image)
            if len(batch) == BATCH:
                classify()
        if batch:
            classify()
    print(len(best))


def zoo(folder: Path, onnx: Path, workers: int, threads: int) -> None:
    """`dcp-zoo predict`, with as many workers as threads."""
    from dcp_zoo.cli import main

    output = folder.with_name(f"{time.time_ns()}.csv")
    sys.argv = ["dcp-zoo", "predict", str(folder), "--head", str(onnx), "--output", str(output)]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with suppress(SystemExit):
        main()
    print(sum(1 for _ in output.open()) - 1)


VARIANTS = {
    "bare": lambda *args: bare(*args, passive=False),
    "bare, passive": lambda *args: bare(*args, passive=True),
    "zoo": zoo,
}


def child(variant: str, folder: str, onnx: str, workers: str, threads: str) -> None:
    """Run one variant; the last line of stdout is this process's peak memory in MB."""
    VARIANTS[variant](Path(folder), Path(onnx), int(workers), int(threads))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(variant: str, number: int, folder: Path, onnx: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", variant, str(folder), str(onnx)]
    before, started = os.times(), time.perf_counter()
    done = subprocess.run([*command, str(chosen.workers), str(chosen.threads)], stdout=subprocess.PIPE, check=True)
    seconds, after = time.perf_counter() - started, os.times()
    images, peak = done.stdout.split()[-2:]
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    values = (variant, number, int(images), chosen.workers, seconds, int(images) / seconds, cpu, float(peak))
    row = dict(zip(COLUMNS, (round(v, 2) if isinstance(v, float) else v for v in values), strict=True))
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(*chosen.child)
        return
    from dcp_zoo.deploy.onnx_cache import onnx_file

    onnx = onnx_file(HEAD)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        make_images(folder, chosen.images)
        quarter = Path(temporary) / "quarter"
        quarter.mkdir()
        for path in sorted(folder.rglob("*.jpg"))[: chosen.images // 4]:
            (quarter / path.name).symlink_to(path)
        rows = [measure("zoo", 0, quarter, onnx, chosen)]
        rows += [
            measure(variant, number, folder, onnx, chosen)
            for number in range(1, chosen.rounds + 1)
            for variant in VARIANTS
        ]
    with chosen.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    rates = {
        name: [row["images_per_second"] for row in rows if row["variant"] == name and row["round"]] for name in VARIANTS
    }
    costs = {name: [row["cpu_seconds"] for row in rows if row["variant"] == name and row["round"]] for name in VARIANTS}
    for name in ("bare", "bare, passive"):
        rate = median(a / b for a, b in zip(rates["zoo"], rates[name], strict=True))
        cost = median(a / b for a, b in zip(costs["zoo"], costs[name], strict=True))
        print(f"zoo / {name}: {rate:.2f} of the rate, {cost:.2f} of the processor time (median of the rounds)")


if __name__ == "__main__":
    main()
