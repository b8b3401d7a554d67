"""Size, speed and parity of a head's exported file.

    python benchmarks/formats.py --data-root DATA      writes results/formats.csv; DATA holds caltech-101

File and model classify the same batch of 8 in turn, in one process with one thread. These images are already resized:
decoding does not count. The speed is relative to the fused model in PyTorch. The difference is the largest one of a
probability to PyTorch's, on 40 validation images from their files.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dcp_zoo import create_model, create_transform
from dcp_zoo.data import few_shot, load_image, load_split
from dcp_zoo.prediction.onnx import OnnxClassifier
from dcp_zoo.release.onnx import export

HEAD = "dcp_mini.caltech101-16shot"
IMAGES, BATCH, REPEATS = 40, 8, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = create_model(HEAD, True).eval()
    split = load_split(model.info["dataset"], args.data_root)
    chosen = few_shot(split, model.info["shots"], model.info["seed"]).val
    photographs = [load_image(item.path) for item in chosen[:: len(chosen) // IMAGES][:IMAGES]]
    fused, transform = model.fuse(), create_transform(model)
    images = torch.stack([transform(image) for image in photographs])
    with torch.inference_mode(), tempfile.TemporaryDirectory() as temporary:
        expected = fused(images).softmax(-1).numpy()
        rows, runs = [], {"PyTorch, fused": lambda: fused(images[:BATCH])}
        file, name = Path(temporary) / "model.onnx", "ONNX, float32"
        exported = OnnxClassifier(export(model, file), threads=1)
        batch = np.stack([exported.preprocess(image) for image in photographs])
        found = exported.probabilities(batch)
        rows.append(
            {
                "format": name,
                "mb": file.stat().st_size / 1e6,
                "difference": np.abs(found - expected).max(),
                "same_answer": 100 * (found.argmax(1) == expected.argmax(1)).mean(),
            }
        )
        runs[name] = lambda: exported.probabilities(batch[:BATCH])
        speeds = relative_speeds(runs)
    with (Path(__file__).parent / "results" / "formats.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "speed"])
        writer.writeheader()
        for row in rows:
            rounded = {k: float(f"{v:.3g}") if isinstance(v, np.floating | float) else v for k, v in row.items()}
            writer.writerow(rounded | {"speed": round(speeds[row["format"]], 2)})
            print(row | {"speed": speeds[row["format"]]})


def relative_speeds(runs: dict) -> dict[str, float]:
    """How much faster than the first each is, by the medians of calls in turn."""
    times = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, call in runs.items():
            start = time.thread_time()
            call()
            if repeat:  # the first warms up
                times[name].append(time.thread_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    return {name: first / median for name, median in medians.items()}


if __name__ == "__main__":
    main()
