"""How fast, and in how much memory: the method as its release computes it, this package's ways, and CLIP alone.

    python benchmarks/speed.py --quick        about 15 minutes on two cores: what SPEED.md shows
    python benchmarks/speed.py                the whole grid; hours, and 32 GB of memory for the release's way

Every variant lives in a process of its own. The processes of one comparison take turns, one call each, so that what
else the machine does hits all of them alike; ratios are of medians. All start from the same weights, and their logits
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("task", "model", "classes", "batch", "variant", "seconds", "fastest", "cpu_seconds", "repeats")
COLUMNS += ("peak_mb", "loaded_mb")
INFERENCE = ("plain", "unfused", "fused", "encode_image", "onnxruntime")
TRAINING = ("plain", "ours", "ours-bfloat16")
TASKS = ("inference", "training", "startup")
MODELS = ("dcp_mini", "dcp_vitb32", "dcp_vitb16")


class Case(NamedTuple):
    task: str  # "inference" or "training"
    model: str
    classes: int
    batch: int
    variants: tuple[str, ...]
    repeats: int = 5


def quick_grid() -> Iterator[Case]:
    """What the statements in SPEED.md rest on."""
    light = INFERENCE[1:]
    for batch in (1, 4, 16):
        yield Case("inference", "dcp_vitb16", 100, batch, INFERENCE if batch == 1 else light)
    yield Case("inference", "dcp_vitb16", 1000, 16, ("plain", "unfused", "fused", "encode_image"), 2)
    for classes in (10, 100):
        yield Case("training", "dcp_vitb16", classes, 4, TRAINING)
    yield Case("training", "dcp_vitb16", 1000, 4, TRAINING[1:])
    for model in ("dcp_vitb32", "dcp_mini"):
        yield Case("inference", model, 100, 16, INFERENCE)
        yield Case("training", model, 100, 4, TRAINING)


def full_grid() -> Iterator[Case]:
    for model, classes, batch in itertools.product(MODELS, (10, 100, 1000), (1, 4, 16, 64)):
        yield Case("inference", model, classes, batch, INFERENCE)
        too_big = classes == 1000 and model != "dcp_mini"  # over 24 GB
        yield Case("training", model, classes, batch, TRAINING[1:] if too_big else TRAINING)


# ------------------------------------------------------------------------------------------ one variant, in its process


def build_model(case: Case) -> Any:
    """The same random model and images in every process, calibrated on the images: then all contexts agree."""
    import torch

    from dcp_zoo import create_model
    from dcp_zoo.data import classnames

    torch.manual_seed(0)
    names = classnames("imagenet") if case.classes == 1000 else classnames("caltech101")[: case.classes]
    model = create_model(case.model, classnames=names).eval()
    return model, torch.randn(case.batch, *model.pretrained_cfg["input_size"])


def prepare(case: Case, folder: Path) -> None:
    """Files that the deployed variants start from: the fused model, the image tower and the images."""
    import torch
    from safetensors.torch import save_file

    from dcp_zoo.export import export

    model, images = build_model(case)
    model.calibrate(images)
    export(model, folder / "fused.safetensors", "safetensors")
    if "onnxruntime" in case.variants:
        export(model, folder / "fused.onnx", "onnx")
    save_file({n: t.contiguous() for n, t in model.visual.state_dict().items()}, folder / "visual.safetensors")
    torch.save(images, folder / "images.pt")


def inference(case: Case, variant: str, folder: Path) -> Callable[[], Any]:
    import torch
    from safetensors.torch import load_file

    from dcp_zoo import reference
    from dcp_zoo.fused import load_fused
    from dcp_zoo.onnx_classifier import OnnxClassifier

    images = torch.load(folder / "images.pt")
    if variant == "fused":
        fused = load_fused(folder / "fused.safetensors")
        return lambda: fused(images)
    if variant == "onnxruntime":
        session = OnnxClassifier(folder / "fused.onnx", threads=torch.get_num_threads())
        return lambda: torch.from_numpy(session(images.numpy()))
    if variant == "encode_image":
        visual = image_tower(case.model)
        visual.load_state_dict(load_file(folder / "visual.safetensors"), assign=True)
        if case.model == "dcp_mini":
            visual.conv1.stem.to(memory_format=torch.channels_last)  # as it is in the package
        return lambda: visual(images)
    model, _ = build_model(case)
    if variant == "plain":
        return lambda: reference.forward(model, images)
    model.calibrate(images)
    return lambda: model(images)


def image_tower(name: str) -> Any:
    """open_clip's image tower alone, without memory for its weights yet."""
    import open_clip
    import torch

    from dcp_zoo.mini import build_mini_clip
    from dcp_zoo.registry import get_spec

    spec = get_spec(name)
    with torch.device("meta"):
        if spec.clip is None:
            return build_mini_clip().visual.eval()
        return open_clip.CLIP(**open_clip.get_model_config(spec.clip), quick_gelu=True).visual.eval()


def training(case: Case, variant: str, folder: Path) -> Callable[[], Any]:
    import torch
    from torch.nn import functional as F

    from dcp_zoo import reference
    from dcp_zoo.training import autocast, cast_frozen

    model, images = build_model(case)
    model.train()
    precision = "bfloat16" if variant.endswith("bfloat16") else "float32"
    cast_frozen(model, precision)
    labels = torch.arange(case.batch) % case.classes
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-6, momentum=0.9)

    def step() -> torch.Tensor:
        with autocast(torch.device("cpu"), precision):
            logits = reference.forward(model, images) if variant == "plain" else model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        return logits.detach()

    return step


def work(pipe: Any, case: Case, variant: str, folder: Path, threads: int) -> None:
    """A process: build one variant, then run it each time it is asked to, and say how long it took."""
    import torch

    torch.set_num_threads(threads)
    if variant == "prepare":
        prepare(case, folder)
        return
    loaded = peak_mb()  # the libraries
    call = (inference if case.task == "inference" else training)(case, variant, folder)
    with torch.inference_mode(case.task == "inference"):
        pipe.send(call().float())  # warms up, too
        while pipe.recv() == "go":
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            pipe.send((time.perf_counter() - wall, time.process_time() - cpu))
    pipe.send((peak_mb(), loaded))


def peak_mb() -> float:
    """Peak resident memory of this process in MB. Linux's rusage would count its parent's, too."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts in bytes


# ---------------------------------------------------------------------------------------------------------- comparisons


def compare(case: Case, threads: int) -> list[dict[str, Any]]:
    """One row for each variant of a case, measured in turns."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        if case.task == "inference":
            process = context.Process(target=work, args=(None, case, "prepare", Path(folder), threads))
            process.start()
            process.join()
        workers = {}
        for variant in case.variants:
            pipe, other = context.Pipe()
            process = context.Process(target=work, args=(other, case, variant, Path(folder), threads))
            process.start()
            other.close()  # so that a worker that dies ends the wait for it
            workers[variant] = (pipe, process)
            check_agreement(case, variant, pipe.recv(), workers)
        times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in case.variants}
        for _ in range(case.repeats):
            for variant, (pipe, _) in workers.items():
                pipe.send("go")
                times[variant].append(pipe.recv())
        return [row(case, variant, times[variant], *workers[variant]) for variant in case.variants]


EXPECTED: dict[Case, Any] = {}  # logits of a case's first variant


def check_agreement(case: Case, variant: str, logits: Any, workers: Any) -> None:
    """All variants must compute the same thing; CLIP's own features are another thing, and bfloat16 is coarse."""
    if variant == "encode_image":
        return
    expected = EXPECTED.setdefault(case, logits)
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if error > (0.1 if variant.endswith("bfloat16") else 1e-3):
        raise SystemExit(f"{case}: {variant} computes other logits, relative difference {error:.2g}")


def row(case: Case, variant: str, times: list[tuple[float, float]], pipe: Any, process: Any) -> dict[str, Any]:
    pipe.send("end")
    peak, loaded = pipe.recv()
    process.join()
    wall, cpu = zip(*times, strict=True)
    seconds = f"{statistics.median(wall):.4f}", f"{min(wall):.4f}", f"{statistics.median(cpu):.4f}", len(times)
    return dict(zip(COLUMNS, (*case[:4], variant, *seconds, f"{peak:.0f}", f"{loaded:.0f}"), strict=True))


# ----------------------------------------------------------------------------------------------------- start of process

IMPORTS = "import torch, timm, open_clip"
BUNDLED = """
import torch
from dcp_zoo import create_model
model = create_model("dcp_mini.caltech101-16shot", True).eval()
with torch.inference_mode():
    model(torch.zeros(1, *model.pretrained_cfg["input_size"]))
"""
# the weights of a ViT-B/16 lie in a file, as they do in the Hub client's cache
CACHED = """
import open_clip, sys, torch
from dcp_zoo import DCP
from dcp_zoo.loading import load_clip, skip_init
with skip_init():
    clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"), quick_gelu=True)
load_clip(clip, sys.argv[1])
model = DCP(clip, ["cat", "dog"]).eval()
with torch.inference_mode():
    model(torch.zeros(1, 3, 224, 224))
"""


def startup(repeats: int, threads: int) -> list[dict[str, Any]]:
    """Whole processes from start to first logits, beside one that only imports what cannot be avoided."""
    from safetensors.torch import save_file

    scripts = {"imports alone": IMPORTS, "bundled head": BUNDLED, "cached ViT-B/16": CACHED}
    times: dict[str, list[float]] = {name: [] for name in scripts}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.safetensors"
        import open_clip

        save_file(open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")).state_dict(), path)
        for round_ in range(repeats + 1):  # the first fills the disk cache
            for name, script in scripts.items():
                started = time.perf_counter()
                env = os.environ | {"OMP_NUM_THREADS": str(threads)}
                subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=env)
                if round_:
                    times[name].append(time.perf_counter() - started)
    base = {"task": "startup", "model": "", "classes": "", "batch": "", "repeats": repeats}
    return [
        base | {"variant": name, "seconds": f"{statistics.median(t):.3f}", "fastest": f"{min(t):.3f}"}
        for name, t in times.items()
    ]


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
        "load before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "threads": threads,
        "command": " ".join(["python", *sys.argv]),
    }


def tables(rows: list[dict[str, Any]], clock: str) -> str:
    """Markdown: seconds by a clock, and ratios to the release's way and to CLIP's image tower alone."""
    lines = []
    groups = itertools.groupby(rows, lambda r: (r["task"], r["model"], r["classes"], r["batch"]))
    for task, group in itertools.groupby(groups, lambda g: g[0][0]):
        lines += ["", f"### {task.capitalize()}", "", "| model | classes | batch | variant | s | faster than plain |"]
        lines[-1] += " x encode_image | peak MB |" if task == "inference" else " peak MB |"
        lines.append("|---|---|---|---|---|---|---|" + ("---|" if task == "inference" else ""))
        for key, members in group:
            by_variant = {r["variant"]: r for r in members}
            plain, encode = (float(by_variant.get(v, {}).get(clock, "nan")) for v in ("plain", "encode_image"))
            for variant, r in by_variant.items():
                s = float(r.get(clock) or r["seconds"])
                cells = [*map(str, key[1:]), variant, f"{s:.3f}", f"{plain / s:.1f}"]
                cells += [f"{s / encode:.2f}"] if task == "inference" else []
                lines.append("| " + " | ".join([*cells, r.get("peak_mb", "")]).replace("nan", "") + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], clock: str, path: Path) -> None:
    """Growth over the classes (training) and over the batch (inference), ViT-B/16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = (("training", "classes", "batch", "4"), ("inference", "batch", "classes", "100"))
    for axis, (task, over, fixed, value) in zip(axes, panels, strict=True):
        chosen = [r for r in rows if r["task"] == task and r["model"] == "dcp_vitb16" and str(r[fixed]) == value]
        for variant in dict.fromkeys(r["variant"] for r in chosen):
            points = sorted((int(r[over]), float(r[clock])) for r in chosen if r["variant"] == variant)
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.set(xscale="log", yscale="log", xlabel=over, ylabel="seconds", title=f"{task}, ViT-B/16, {fixed} {value}")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small grid")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="what to measure (default all)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and ONNX Runtime (default 2)")
    parser.add_argument(
        "--clock",
        default="seconds",
        choices=("seconds", "cpu_seconds"),
        help="what tables and plots show: wall clock, or, where a machine has other work to do, processor time; the "
        "latter makes sense with --threads 1, as threads that wait for each other count",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for speed.csv, speed.json and speed.png")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed.json").write_text(json.dumps(machine(args.threads), indent=1) + "\n")
    rows: list[dict[str, Any]] = []
    cases: list[Any] = [case for case in (quick_grid() if args.quick else full_grid()) if case.task in args.tasks]
    cases += ["startup"] * ("startup" in args.tasks)
    with (args.output / "speed.csv").open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for i, case in enumerate(cases, 1):
            print(f"{i}/{len(cases)}: {case}", file=sys.stderr)
            new = startup(5, args.threads) if case == "startup" else compare(case, args.threads)
            writer.writerows(new)
            rows += new
    plot(rows, args.clock, args.output / "speed.png")
    print(tables(rows, args.clock))


if __name__ == "__main__":
    main()
