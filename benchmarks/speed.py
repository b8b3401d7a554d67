"""Speed and memory of the method as in its release, of this package's implementations, and of CLIP alone.

    python benchmarks/speed.py      writes results/speed.csv and speed.json, for docs/deploy.md

Every variant runs in its own process. The processes of one comparison take turns, one call each, so that
other load on the machine affects all of them equally; ratios are those of medians. All start from the same
weights, and their logits are compared before anything is timed. CLIP's weights are random here: speed does
not depend on them.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
COLUMNS = "task model classes batch variant seconds cpu_seconds repeats peak_mb file_mb difference".split()
REPEATS = 5  # calls per variant
SPEND = 12.0  # seconds in total, after which there are no further turns
LONG = 20.0  # seconds; the first call counts if it takes this long, as the warm-up is then negligible
TOLERANCE = 1e-3  # in logits, relative to the largest
COARSE = {"ours-bfloat16": 0.1}  # tolerance of low precision; the CSV has the actual difference
INFERENCE = ("plain", "fused", "encode_image", "onnxruntime")
FILES = {"fused": "fused.pt", "onnxruntime": "fused.onnx", "encode_image": "visual.pt"}


class Case(NamedTuple):
    task: str  # "inference" or "training"
    model: str
    classes: int
    batches: tuple[int, ...]  # ascending, as a process's peak memory is that of its largest batch so far
    variants: tuple[str, ...]


GRID = (
    Case("training", "dcp_vitb16", 10, (4,), ("plain", "ours")),
    Case("training", "dcp_vitb16", 100, (4,), ("plain", "ours", "ours-bfloat16")),
    Case("training", "dcp_vitb16", 1000, (4,), ("ours",)),
    Case("inference", "dcp_vitb16", 100, (1, 16), INFERENCE),
    Case("inference", "dcp_vitb16", 1000, (16,), ("plain", "fused")),
    Case("inference", "dcp_mini", 100, (16,), INFERENCE),
)


# -------------------------------------------------------------------------------------------------------------- models


def build_model(case: Case) -> Any:
    """The same random model in every process."""
    import torch

    from dcp_zoo import create_model
    from dcp_zoo.data import classnames

    torch.manual_seed(0)
    names = classnames("imagenet") if case.classes == 1000 else classnames("caltech101")[: case.classes]
    return create_model(case.model, classnames=names).eval()


def make_images(case: Case, batch: int) -> Any:
    """(batch, 3, H, W): one random image repeated, so that the context is the same for every batch size."""
    import torch

    from dcp_zoo import get_pretrained_cfg

    size = get_pretrained_cfg(case.model)["input_size"]
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(1)).repeat(batch, 1, 1, 1)


def prepare(case: Case, folder: Path) -> None:
    """Write the files of the deployed variants. The model is calibrated on the images, so that all contexts
    agree."""
    import torch

    from dcp_zoo.release.onnx import export

    model = build_model(case)
    model.store_stats(make_images(case, 1))
    fused = model.fuse()
    torch.save(fused, folder / FILES["fused"])
    torch.save(model.encoder.visual, folder / FILES["encode_image"])
    if "onnxruntime" in case.variants:
        export(fused, folder / FILES["onnxruntime"])


def cache_clip(cache: Path, name: str) -> None:
    """Write random weights of this CLIP model to a cache like that of the Hub's client."""
    from safetensors.torch import save_file

    from dcp_zoo import create_model
    from dcp_zoo.zoo.specs import get_spec

    weights = create_model(name).encoder.clip.state_dict()
    spec = get_spec(name)
    repo = cache / f"models--{spec.clip_repo.replace('/', '--')}"
    revision = spec.clip_revision or "0" * 40
    folder = repo / "snapshots" / revision
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")


Call = Callable[[Any], Any]  # images -> logits or features


def inference(case: Case, variant: str, folder: Path) -> Call:
    import reference
    import torch

    from dcp_zoo.prediction.onnx import OnnxClassifier

    if variant == "onnxruntime":
        session = OnnxClassifier(folder / FILES[variant], threads=torch.get_num_threads())
        return lambda images: torch.from_numpy(session(images.numpy()))
    if variant in FILES:
        return torch.load(folder / FILES[variant], weights_only=False, mmap=True).eval()
    model = build_model(case)
    return lambda images: reference.forward(model, images)


def training(case: Case, variant: str, folder: Path) -> Call:
    """A complete training step with a learning rate of 0: the same work, and all variants keep equal
    weights."""
    import reference
    import torch
    from torch.nn import functional as F

    from dcp_zoo.features.device import autocast

    model = build_model(case).train()
    precision = "bfloat16" if variant == "ours-bfloat16" else "float32"
    for p in model.encoder.clip.parameters():
        if p.numel() > 1:
            p.data = p.data.to(getattr(torch, precision))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0, momentum=0.9)

    def step(images: Any) -> Any:
        with autocast(torch.device("cpu"), precision):
            logits = reference.forward(model, images) if variant == "plain" else model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), torch.arange(len(images)) % case.classes).backward()
        optimizer.step()
        return logits.detach()

    return step


# ----------------------------------------------------------------------------------------------------------- processes


class Timing(NamedTuple):
    output: Any
    wall: float
    cpu: float
    peak_mb: float


def work(pipe: Any, case: Case, variant: str, folder: Path, threads: int) -> None:
    """A worker process: build one variant, then run it on each batch size received, and send the results."""
    import torch

    torch.set_num_threads(threads)
    if variant == "prepare":
        prepare(case, folder)
        return
    call = (inference if case.task == "inference" else training)(case, variant, folder)
    with torch.inference_mode(case.task == "inference"):
        while True:
            batch = pipe.recv()
            if not batch:
                break
            images = make_images(case, batch)
            wall = time.perf_counter()
            cpu = time.process_time()
            output = call(images)
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            pipe.send(Timing(output.float().numpy(), wall, cpu, peak_mb()))


def peak_mb() -> float:
    """Peak resident memory of this process in MB. Linux's rusage would include its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts in bytes


class Worker:
    """The process of one variant."""

    def __init__(self, case: Case, variant: str, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, case, variant, folder, threads))
        self.process.start()
        other.close()  # so that waiting ends if the worker dies

    def call(self, batch: int) -> Timing:
        self.pipe.send(batch)
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.send(0)
        self.process.join()


def compare(case: Case, threads: int, repeats: int = REPEATS) -> Iterator[dict[str, Any]]:
    """One row per batch size and variant of a case, measured in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if case.task == "inference":
            Worker(case, "prepare", folder, threads).process.join()
        workers = {v: Worker(case, v, folder, threads) for v in case.variants}
        for batch in case.batches:
            for variant, (calls, difference) in measure(batch, workers, repeats).items():
                path = folder / FILES.get(variant, "")
                row = dict(zip(COLUMNS, (*case[:3], batch, variant), strict=False)) | {"repeats": len(calls)}
                row |= {"seconds": round(statistics.median(call.wall for call in calls), 4)}
                row |= {"cpu_seconds": round(statistics.median(call.cpu for call in calls), 4)}
                row |= {"peak_mb": round(calls[-1].peak_mb), "difference": difference}
                yield row | {"file_mb": round(path.stat().st_size / 1e6, 1) if path.is_file() else None}
        for worker in workers.values():
            worker.stop()


def measure(batch: int, workers: dict[str, Worker], repeats: int) -> dict[str, tuple[list[Timing], str | None]]:
    """Calls of all variants in turns, and the difference of the first one's logits from the first
    variant's."""
    results: dict[str, tuple[list[Timing], str | None]] = {}
    expected = None
    for variant, worker in workers.items():
        first = worker.call(batch)
        expected = first.output if expected is None else expected
        difference = None if variant == "encode_image" else difference_of(first.output, expected)
        if difference and difference > COARSE.get(variant, TOLERANCE):
            raise SystemExit(f"{variant} computes different logits, relative difference {difference:.2g}")
        shown = None if difference is None else f"{difference:.1e}"
        results[variant] = [first] if first.wall >= LONG else [], shown
    for _, (variant, worker) in itertools.product(range(repeats), workers.items()):
        calls = results[variant][0]
        if len(calls) < 2 or sum(call.wall for call in calls) < SPEND:
            calls.append(worker.call(batch))
    return results


def difference_of(output: Any, expected: Any) -> float:
    return float(abs(output - expected).max() / abs(expected).max())


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), cpu)
    versions = {name: version(name) for name in ("torch", "timm", "open_clip_torch", "onnxruntime", "onnx")}
    load = round(os.getloadavg()[0], 2)
    return {"cpu": cpu, "cores": os.cpu_count(), "load before": load, "date": time.strftime("%Y-%m-%d"), **versions}


def main() -> None:
    from growing import GrowingTable  # not in the processes whose memory is measured

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch and ONNX Runtime (default: 2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of speed.csv and speed.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed.json").write_text(json.dumps(machine() | {"threads": args.threads}, indent=1) + "\n")
    (args.output / "speed.csv").unlink(missing_ok=True)
    table = GrowingTable(args.output / "speed.csv", COLUMNS, COLUMNS[:5])
    for case in GRID:
        table.add(compare(case, args.threads))


if __name__ == "__main__":
    main()
