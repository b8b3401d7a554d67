"""Throughput and latency of `dcp-zoo serve` under load, against ONNX Runtime alone.

    python benchmarks/serving.py                  about eight minutes; writes results/serving.csv
    python benchmarks/serving.py --model m.onnx   another file than the bundled head's

16 locust users without pauses send JPEGs of 500 x 375 pixels. The bare loop decodes and preprocesses the same files in
as many threads as the server has, and runs batches of 16. Both take turns on the same machine. The users need processor
time too, which is the server's loss in the wall clock's ratio; images per second of processor time leave them out.
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from dcp_zoo.cli.deploy import onnx_file
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.prediction.onnx import OnnxClassifier
from dcp_zoo.threads import available_cores

HERE = Path(__file__).parent
USERS, BATCH = 16, 16
HEAD = "dcp_mini.caltech101-16shot"


def photographs() -> list[bytes]:
    """Eight JPEGs: parts of the two sample photographs."""
    files = []
    for path, left in itertools.product(sample_images(), (0, 20, 40, 60)):
        file = BytesIO()
        load_image(path).crop((left, 0, left + 560, 420)).resize((500, 375)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def bare(model: OnnxClassifier, files: list[bytes], seconds: float, threads: int) -> tuple[float, float]:
    """Images per second, and per second of processor time, of a plain loop."""

    def read(data: bytes) -> np.ndarray:
        return model.preprocess(Image.open(BytesIO(data)).convert("RGB"))

    endless, images = itertools.cycle(files), 0
    with ThreadPoolExecutor(threads) as pool:
        start, cpu = time.perf_counter(), time.process_time()
        ready = pool.map(read, itertools.islice(endless, BATCH))
        while time.perf_counter() - start < seconds:
            batch, ready = list(ready), pool.map(read, itertools.islice(endless, BATCH))  # decoded during the run
            images += len(model.probabilities(np.stack(batch)))
        return images / (time.perf_counter() - start), images / (time.process_time() - cpu)


def load(address: str, process: psutil.Process, files: list[bytes], seconds: float) -> dict[str, float]:
    """Let users send requests; what they saw, and the server's processor time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photographs").mkdir()
        for i, data in enumerate(files):
            (folder / "photographs" / f"{i}.jpg").write_bytes(data)
        before = sum(process.cpu_times()[:2])
        command = [sys.executable, "-m", "locust", "-f", str(HERE / "serving_users.py"), "--headless"]
        command += ["--host", address]
        command += ["--users", str(USERS), "--spawn-rate", str(USERS), "--run-time", f"{seconds:.0f}s"]
        command += ["--stop-timeout", "30", "--only-summary", "--csv", str(folder / "x")]
        command += ["--photographs", str(folder / "photographs")]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        with (folder / "x_stats.csv").open() as file:
            total = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    requests, cpu = int(total["Request Count"]), sum(process.cpu_times()[:2]) - before
    if not requests:
        raise SystemExit("The users got no answer: try longer --seconds.")
    return {
        "requests": requests,
        "failures": int(total["Failure Count"]),
        "per_second": float(total["Requests/s"]),
        "per_cpu_second": requests / cpu,
        "p50_ms": float(total["50%"]),
        "p99_ms": float(total["99%"]),
    }


def measure(args: argparse.Namespace, path: Path, address: str, process: psutil.Process) -> list[dict]:
    """The rows of all turns."""
    files, model, rows = photographs(), OnnxClassifier(path, args.threads), []
    for turn in range(args.turns):
        per_second, per_cpu = bare(model, files, args.seconds, args.threads)
        rows.append({"part": "onnxruntime", "turn": turn, "per_second": per_second, "per_cpu_second": per_cpu})
        rows.append({"part": "server", "turn": turn} | load(address, process, files, args.seconds))
        print(*rows[-2:], sep="\n", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--seconds", type=float, default=20, help="of one turn")
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    path = args.model or onnx_file(HEAD)
    command = [sys.executable, "-m", "dcp_zoo", "serve", "--head", str(path), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split(" at ")[1].split()[0]
        rows = measure(args, path, address, psutil.Process(server.pid))
    finally:
        server.terminate()
    with (HERE / "results" / "serving.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
