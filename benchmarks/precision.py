"""What a precision costs and changes: time and memory by model and runtime, and the miniature's answers.

    python benchmarks/precision.py                              precision.csv: dcp_vitb16 in torch and ONNX Runtime
    python benchmarks/precision.py --models                     model_costs.csv: a model of each architecture, in torch
    python benchmarks/precision.py --answers --data-root DATA   precision_answers.csv: DATA holds caltech-101
    python benchmarks/precision.py --folder                     precision_folder.csv: a folder, on an idle machine

Weights of models that are not part of the package are random. Each row is a process of its own with one thread, which
classifies the same batch of decoded images as `dcp-zoo predict` does; its time is the processor's, which counts on a
busy machine too. Caches are shared with other processes, so it is the fastest of some repeats. The answers are those of
a bundled head on 2,000 test images. A folder of JPEGs is classified by `dcp_zoo.predict` with all threads, from files
to predictions, in turns; its time is the wall clock's.
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
RUNS = [("torch", "float32"), ("torch", "bfloat16"), ("onnx", "float32"), ("onnx", "float16")]
HEAD, IMAGES = "dcp_mini.caltech101-16shot", 2000
FOLDER_IMAGES, TURNS = 200, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--folder", action="store_true")
    parser.add_argument("--data-root")
    parser.add_argument("--one", nargs=4, help="for the processes that are started here")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(cost(*args.one)))
    elif args.answers:
        write("precision_answers", answers(args.data_root))
    elif args.folder:
        write("precision_folder", folder_times())
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
        export_file(model, precision, Path(folder))
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


def export_file(name: str, precision: str, folder: Path) -> None:
    from dcp_zoo.deploy.export import export

    export(random_model(name), folder / f"{precision}.onnx", precision=precision)


def cost(name: str, runtime: str, precision: str, folder: str) -> dict[str, Any]:
    import torch

    from dcp_zoo.deploy.onnx_classifier import onnx_predictor
    from dcp_zoo.training.predictor import torch_predictor

    torch.set_num_threads(1)
    if runtime == "onnx":
        predictor = onnx_predictor(Path(folder) / f"{precision}.onnx", 1)
    else:
        predictor = torch_predictor(random_model(name), precision=precision)
    images, seconds = pixels(name), []
    while len(seconds) < 3 or (len(seconds) <= REPEATS and sum(seconds) < ENOUGH):  # the first warms up
        started = time.process_time()
        predictor.compute(images)
        seconds.append(time.process_time() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"model": name, "runtime": runtime, "precision": precision}
    return found | {"core_ms_per_image": round(1000 * min(seconds[1:]) / BATCH, 1), "peak_mb": round(memory)}


def folder_times() -> list[dict[str, Any]]:
    import torch
    from bulk import make_images

    from dcp_zoo import predict

    model, rows = random_model("dcp_vitb16"), []
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), FOLDER_IMAGES)
        paths = sorted(map(str, Path(folder).rglob("*.jpg")))
        predict(model, paths[:BATCH])
        for turn in range(1, TURNS + 1):
            for precision in ("float32", "bfloat16"):
                started = time.perf_counter()
                predict(model, paths, precision=precision)
                seconds = round(time.perf_counter() - started, 1)
                row = {"precision": precision, "turn": turn, "images": FOLDER_IMAGES, "seconds": seconds}
                rows.append(row | {"threads": torch.get_num_threads()})
                print(rows[-1], flush=True)
    return rows


def answers(data_root: str) -> list[dict[str, Any]]:
    import torch

    from dcp_zoo import create_model
    from dcp_zoo.data import load_split
    from dcp_zoo.training.evaluation import expected_calibration_error, predict, top1
    from dcp_zoo.training.sources import image_source

    model = create_model(HEAD, True).eval()
    items = load_split(model.info["dataset"], data_root).test
    items = sorted(items, key=lambda item: item.key)[:: max(1, len(items) // IMAGES)][:IMAGES]
    labels, rows, exact = torch.tensor([item.label for item in items]), [], None
    for precision in ("float32", "bfloat16"):
        logits = predict(model, image_source(model.frozen, items, precision=precision), 32)
        exact = logits if exact is None else exact
        rows.append(
            {
                "precision": precision,
                "images": len(items),
                "same_answer": round(100 * float((logits.argmax(1) == exact.argmax(1)).float().mean()), 2),
                "logits_apart": round(float((logits - exact).abs().max()), 3),
                "top1": top1(logits, labels),
                "ece": expected_calibration_error(logits, labels),
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
