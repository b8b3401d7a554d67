"""What a precision costs: time and memory by model and runtime.

    python benchmarks/precision.py              precision.csv: dcp_vitb16 in torch and ONNX Runtime
    python benchmarks/precision.py --models     model_costs.csv: a model of each architecture, in torch

Weights of models that are not part of the package are random. Each row is a process of its own with one thread, which
classifies the same batch of decoded images as `dcp-zoo predict` does; its time is the processor's, which counts on a
busy machine too. Caches are shared with other processes, so it is the fastest of some repeats.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcp_zoo.zoo.registry import MODELS

RESULTS = Path(__file__).parent / "results"
BATCH, REPEATS, CLASSES = 8, 5, 100
ENOUGH = 20  # seconds, after which a large model is not repeated more than once
RUNS = [("torch", "float32"), ("torch", "bfloat16"), ("onnx", "float32")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--one", nargs=4, help="for the processes that are started here")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(cost(*args.one)))
    else:
        by_clip = {spec.clip: name for name, spec in reversed(MODELS.items())}  # weights change neither time nor memory
        models = [(name, "torch", "float32") for name in MODELS if name in by_clip.values()]
        plan = models if args.models else [("dcp_vitb16", *run) for run in RUNS]
        with tempfile.TemporaryDirectory() as folder:
            write("model_costs" if args.models else "precision", [in_a_process(*run, folder) for run in plan])


def write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def in_a_process(model: str, runtime: str, precision: str, folder: str) -> dict[str, Any]:
    if runtime == "onnx":
        export_file(model, Path(folder))
    command = [sys.executable, __file__, "--one", model, runtime, precision, folder]
    row: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(row, flush=True)
    return row


def random_model(name: str) -> Any:
    from speed_variants import Case, build_model, make_images

    case = Case("inference", name, CLASSES, (1,), ())
    model = build_model(case)
    model.store_stats(make_images(case, 1))
    return model


def pixels(model: str) -> Any:
    import numpy as np

    from dcp_zoo import get_pretrained_cfg

    size = get_pretrained_cfg(model)["input_size"]
    return np.random.default_rng(0).integers(0, 256, (BATCH, *size), np.uint8)


def export_file(name: str, folder: Path) -> None:
    from dcp_zoo.onnx.export import export

    export(random_model(name), folder / "model.onnx")


def cost(name: str, runtime: str, precision: str, folder: str) -> dict[str, Any]:
    import torch

    from dcp_zoo.prediction.heads import HeadBackend
    from dcp_zoo.prediction.onnx import OnnxClassifier

    torch.set_num_threads(1)
    if runtime == "onnx":
        predictor = OnnxClassifier(Path(folder) / "model.onnx", 1)
    else:
        predictor = HeadBackend(random_model(name), precision=precision)
    images, seconds = pixels(name), []
    while len(seconds) < 3 or (len(seconds) <= REPEATS and sum(seconds) < ENOUGH):  # the first warms up
        started = time.process_time()
        predictor.compute(images)
        seconds.append(time.process_time() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"model": name, "runtime": runtime, "precision": precision}
    return found | {"core_ms_per_image": round(1000 * min(seconds[1:]) / BATCH, 1), "peak_mb": round(memory)}


if __name__ == "__main__":
    main()
