"""Speed and memory of the method as in its release, of this package's implementations, and of CLIP alone.

    python benchmarks/speed.py      about 24 minutes on two cores: every statement of docs/speed.md

Every variant runs in its own process. The processes of one comparison take turns, one call each, so that other load on
the machine affects all of them equally; ratios are those of medians. All start from the same weights, and their logits
are compared before anything is timed. CLIP's weights are random here: speed does not depend on them.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from speed_variants import (
    FILES,
    INFERENCE,
    TRAINING,
    Case,
    inference,
    make_images,
    prepare,
    training,
)

COLUMNS = (
    "task,model,classes,batch,variant,seconds,fastest,cpu_seconds,repeats,peak_mb,loaded_mb,file_mb,difference,note"
)
NAN = float("nan")
RESULTS = Path(__file__).parent / "results"

REPEATS, SPEND = 5, 12.0  # calls per variant; no further turns once they have taken this many seconds in total
LONG = 20.0  # seconds; the first call counts if it takes this long, as the warm-up is then negligible
TOLERANCE = 1e-3  # in logits, relative to the largest
COARSE = {"ours-bfloat16": 0.1}  # tolerance of low precision; the CSV has the actual difference


def grid() -> Iterator[Case]:
    """The cases behind the statements of docs/speed.md, one comparison of ViT-B/32, and the miniature's inference."""
    for classes in (10, 100, 1000):
        variants = {100: TRAINING[:3], 10: TRAINING[:3], 1000: TRAINING[1:]}[classes]
        yield Case("training", "dcp_vitb16", classes, (4,), variants)
    yield Case("inference", "dcp_vitb16", 100, (1, 4, 16, 64), INFERENCE)
    yield Case("inference", "dcp_vitb16", 1000, (16,), INFERENCE[:4])
    yield Case("inference", "dcp_vitb16", 10, (16,), ("plain", "fused", "encode_image"))
    yield Case("inference", "dcp_vitb32", 100, (16,), INFERENCE)
    for classes in (10, 100, 1000):
        yield Case("inference", "dcp_mini", classes, (1, 4, 16, 64), INFERENCE)
    for model in ("dcp_siglip2_b16", "dcp_eva02_b16"):  # image towers of timm
        yield Case("inference", model, 100, (4,), ("fused", "encode_image"))
    for model in ("dcp_vitb32", "dcp_mini"):
        yield Case("training", model, 100, (4,), TRAINING[:3])


# ------------------------------------------------------------------------------------------ one variant, in its process


class Timing(NamedTuple):
    output: Any
    wall: float
    cpu: float
    peak_mb: float


def work(pipe: Any, case: Case, variant: str, folder: Path, threads: int) -> None:
    """A worker process: build one variant, then run it on each batch size received, and send the results."""
    import torch

    import dcp_zoo  # noqa: F401

    torch.set_num_threads(threads)
    if variant == "prepare":
        prepare(case, folder)
        return
    pipe.send(peak_mb())  # of the libraries
    call = (inference if case.task == "inference" else training)(case, variant, folder)
    with torch.inference_mode(case.task == "inference"):
        while batch := pipe.recv():
            images = make_images(case, batch)
            wall, cpu = time.perf_counter(), time.process_time()
            output = call(images)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            pipe.send(Timing(output.float().numpy(), wall, cpu, peak_mb()))


def peak_mb() -> float:
    """Peak resident memory of this process in MB. Linux's rusage would include its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts in bytes


# ---------------------------------------------------------------------------------------------------------- comparisons


class Worker:
    """The process of one variant."""

    def __init__(self, case: Case, variant: str, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, case, variant, folder, threads))
        self.process.start()
        other.close()  # so that waiting ends if the worker dies
        self.variant, self.loaded_mb = variant, 0.0

    def call(self, batch: int) -> Timing | str:
        """One call, or why the process ended."""
        try:
            self.loaded_mb = self.loaded_mb or self.pipe.recv()
            self.pipe.send(batch)
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            code = self.process.exitcode
            return f"ended with exit code {code}" + ", most likely out of memory" * (code == -9)

    def stop(self) -> None:
        if self.process.is_alive():
            self.pipe.send(0)
        self.process.join()


def compare(case: Case, threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per batch size and variant of a case, measured in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder, workers = Path(name), {}
        if case.task == "inference":
            preparation = Worker(case, "prepare", folder, threads)
            preparation.process.join()
            if preparation.process.exitcode:
                raise SystemExit(f"{case}: preparation failed")
        for batch in case.batches:
            workers = workers or {v: Worker(case, v, folder, threads) for v in case.variants}
            results = measure(case, batch, workers, repeats)
            for variant in case.variants:
                path = folder / FILES.get(variant, "")
                file_mb = path.stat().st_size / 1e6 if path.is_file() else NAN
                key = case.task, case.model, case.classes, batch, variant
                yield row(key, results[variant], workers[variant].loaded_mb, file_mb)
        for worker in workers.values():
            worker.stop()


Result = tuple[list[Timing], float]  # calls, and the difference of the first one's logits from the first variant's


def measure(case: Case, batch: int, workers: dict[str, Worker], repeats: int) -> dict[str, Result | str]:
    """Calls of all variants in turns, or why a variant's process ended."""
    results: dict[str, Result | str] = {}
    expected = None
    for variant, worker in workers.items():
        first = worker.call(batch)
        if isinstance(first, str):
            results[variant] = first
            continue
        expected = first.output if expected is None else expected
        difference = NAN if variant == "encode_image" else difference_of(first.output, expected)
        if difference > COARSE.get(variant, TOLERANCE):
            raise SystemExit(f"{case}: {variant} computes different logits, relative difference {difference:.2g}")
        results[variant] = ([first] if first.wall >= LONG else []), difference
    for _, (variant, worker) in itertools.product(range(repeats), workers.items()):
        calls = results[variant][0]
        if isinstance(calls, list) and (len(calls) < 2 or sum(call.wall for call in calls) < SPEND):
            result = worker.call(batch)
            if isinstance(result, str):
                results[variant] = result
            else:
                calls.append(result)
    return results


def difference_of(output: Any, expected: Any) -> float:
    return float(abs(output - expected).max() / abs(expected).max())


def row(key: tuple[Any, ...], result: Result | str, loaded_mb: float, file_mb: float) -> dict[str, Any]:
    cells = dict.fromkeys(COLUMNS.split(","), "") | dict(zip(COLUMNS.split(","), key, strict=False))
    if isinstance(result, str):
        return cells | {"note": result}
    calls, difference = result
    wall = [call.wall for call in calls]
    return cells | {
        "seconds": cell(statistics.median(wall), ".4f"),
        "fastest": cell(min(wall), ".4f"),
        "cpu_seconds": cell(statistics.median(call.cpu for call in calls), ".4f"),
        "repeats": len(calls),
        "peak_mb": cell(calls[-1].peak_mb, ".0f"),
        "loaded_mb": cell(loaded_mb, ".0f"),
        "file_mb": cell(file_mb, ".1f"),
        "difference": cell(difference, ".1e"),
    }


def cell(value: float, spec: str) -> str:
    """A formatted number; "" for NaN, which is what was not measured."""
    return "" if value != value else format(value, spec)


# -------------------------------------------------------------------------------------------------------------- results


def machine(threads: int) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), cpu)
    packages = ("torch", "timm", "open_clip_torch", "onnxruntime", "onnx")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "threads": threads,
        "command": " ".join(["python", *sys.argv]),
    }


def run(threads: int, output: Path) -> None:
    """Measure, and write every row as soon as it is available."""
    cases = list(grid())
    with (output / "speed.csv").open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS.split(","))
        writer.writeheader()
        for i, case in enumerate(cases, 1):
            print(f"{time.strftime('%X')} {i}/{len(cases)}: {case}", file=sys.stderr)
            writer.writerows(compare(case, threads, REPEATS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch and ONNX Runtime (default: 2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of speed.csv and speed.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed.json").write_text(json.dumps(machine(args.threads), indent=1) + "\n")
    run(args.threads, args.output)


if __name__ == "__main__":
    main()
