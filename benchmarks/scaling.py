"""The time that the paper's few-shot sweep would take on 1 to 512 GPUs: a simulation, not a measurement.

    python benchmarks/scaling.py      writes results/scaling_simulated.csv and docs/images/scaling.svg

The CPU time per training step and per image is measured (results/speed.csv, ViT-B/16); steps and images of every trial
come from `plan_trials`. Everything about GPUs is assumed, as listed in `Assumptions`. Each trial goes to the first GPU
that is free, as in the Ray backend.
"""

import csv
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dcp_zoo.benchmark import Trial, plan_trials
from dcp_zoo.benchmark.sweep import IMAGE_BYTES
from dcp_zoo.data import DATASETS
from dcp_zoo.data.dataset import CACHE_BYTES

HERE = Path(__file__).parent
MODEL = "dcp_vitb16"
PROMPTS = ("coop", "vpt-deep", "maple", "dcp")  # trained through CLIP's towers, step by step
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HOURS = (0.1, 0.3, 1, 3, 10, 30)


@dataclass(frozen=True)
class Assumptions:
    """Values that were not measured.

    Attributes:
        speed: of a GPU relative to the measured CPU core, for large matrix products.
        least_step: minimum seconds per training step, for launching its kernels.
        start: seconds from a worker's start to its first trial.
        decode: seconds to read and decode one image, with the CPU cores available per GPU.
        image_mb: megabytes per image file.
    """

    speed: float = 100.0
    least_step: float = 0.03
    start: float = 20.0
    decode: float = 0.002
    image_mb: float = 0.11


SPEED = HERE / "results" / "speed.csv"


Times = tuple[list[int], list[float]]  # numbers of classes, ascending, and seconds with each


class Speed(NamedTuple):
    """Times of a training step of 4 images, and of a batch of 16 test images."""

    step: Times
    batch: Times


def measured_speed() -> Speed:
    """The processor times in `SPEED`."""

    def times(task: str, variant: str, batch: str) -> Times:
        wanted = {"task": task, "model": MODEL, "variant": variant, "batch": batch}
        found = sorted(
            (int(row["classes"]), float(row["cpu_seconds"])) for row in rows if wanted.items() <= row.items()
        )
        return [classes for classes, _ in found], [seconds for _, seconds in found]

    with SPEED.open() as file:
        rows = list(csv.DictReader(file))
    return Speed(times("training", "ours", "4"), times("inference", "unfused", "16"))


MEASURED = measured_speed()


@dataclass(frozen=True)
class Cost:
    """One trial on one GPU: its seconds, the image files it reads, and those read only in a worker's first trial."""

    trial: Trial
    seconds: float
    read: int
    read_first: int


def cost(trial: Trial, a: Assumptions) -> Cost:
    """The cost of a trial; all prompt methods are counted with DCP's step, an upper bound for the cheaper ones."""
    spec = DATASETS[trial.dataset]
    assert spec.num_classes is not None
    assert spec.counts is not None
    steps = trial.steps if trial.method in PROMPTS else 0
    step = max(a.least_step, float(np.interp(spec.num_classes, *MEASURED.step)) / a.speed)
    contexts = 2 if trial.method == "dcp" else 1
    image = float(np.interp(spec.num_classes, *MEASURED.batch)) / 16 / a.speed
    drawn, tested = trial.shots * spec.num_classes, spec.counts[2]
    epochs = max(1, 4 * steps // drawn) if drawn else 0
    read = kept(drawn) + (drawn - kept(drawn)) * epochs + (tested - kept(tested)) * contexts
    return Cost(trial, steps * step + tested * contexts * image + read * a.decode, read, kept(tested))


def kept(images: int) -> int:
    """How many of `images` images a dataset object keeps decoded."""
    return min(images, CACHE_BYTES // IMAGE_BYTES)


def simulate(costs: Sequence[Cost], gpus: int, a: Assumptions) -> tuple[float, float]:
    """Seconds until the last trial ends, and gigabytes read, if each trial goes to the first free GPU."""
    free = [(a.start, gpu) for gpu in range(gpus)]
    held: list[set[str]] = [set() for _ in range(gpus)]  # datasets whose test images a worker has prepared
    end, files = 0.0, 0
    for item in costs:
        now, gpu = heapq.heappop(free)
        first = 0 if item.trial.dataset in held[gpu] else item.read_first
        held[gpu].add(item.trial.dataset)
        now += item.seconds + first * a.decode
        files += item.read + first
        end = max(end, now)
        heapq.heappush(free, (now, gpu))
    return end, files * a.image_mb / 1000


def table(methods: Sequence[str], a: Assumptions) -> Iterable[dict[str, object]]:
    """One row per order of the trials and number of GPUs."""
    trials = plan_trials("few-shot", [MODEL], methods)
    planned = [cost(trial, a) for trial in trials]
    orders = {"as planned": planned, "longest first": sorted(planned, key=lambda c: -c.seconds)}
    one, _ = simulate(planned, 1, a)
    for order, costs in orders.items():
        for gpus in GPUS:
            seconds, gigabytes = simulate(costs, gpus, a)
            yield {
                "methods": len(methods),
                "trials": len(trials),
                "order": order,
                "gpus": gpus,
                "hours": round(seconds / 3600, 2),
                "efficiency": round(one / gpus / seconds, 3),
                "read_gb": round(gigabytes),
                "read_mb_per_s": round(1000 * gigabytes / seconds, 1),
                "longest_trial_hours": round(max(c.seconds for c in costs) / 3600, 2),
            }


def draw(rows: list[dict], path: Path) -> None:
    """Plot hours over GPUs, with ideal scaling and the longest trial."""
    figure = Figure((7, 4), layout="constrained")
    ax = figure.subplots()
    for color, (methods, order) in zip(("#0072B2", "#56B4E9", "#D55E00", "#E69F00"), curves(rows), strict=True):
        curve = [row for row in rows if (row["methods"], row["order"]) == (methods, order)]
        label = f"{'DCP' if methods == 1 else f'{methods} methods'}, {curve[0]['trials']} trials, {order}"
        marker, line = ("o", "-") if order == "as planned" else ("s", "--")
        ax.plot(GPUS, [row["hours"] for row in curve], marker=marker, linestyle=line, color=color, label=label)
        if order == "as planned":
            ax.plot(GPUS, [curve[0]["hours"] / n for n in GPUS], ":", color=color, alpha=0.6)
    ax.axhline(rows[0]["longest_trial_hours"], color="#666666", linewidth=1)
    ax.annotate("DCP's longest trial", (GPUS[0], rows[0]["longest_trial_hours"]), (0, 4), textcoords="offset points")
    ax.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="hours", title="Simulated; dotted: no loss at all")
    ax.set_xticks(GPUS, [str(n) for n in GPUS])
    ax.set_yticks(HOURS, [f"{hours:g}" for hours in HOURS])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="upper right")
    figure.savefig(path)


def curves(rows: list[dict]) -> list[tuple[int, str]]:
    return list(dict.fromkeys((row["methods"], row["order"]) for row in rows))


def main() -> None:
    a = Assumptions()
    rows = [row for methods in (["dcp"], ["zero-shot", "linear-probe", *PROMPTS]) for row in table(methods, a)]
    with (HERE / "results" / "scaling_simulated.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *asdict(a)])
        writer.writeheader()
        writer.writerows(row | asdict(a) for row in rows)
    draw(rows, HERE.parent / "docs" / "images" / "scaling.svg")
    costs = sorted((cost(t, a) for t in plan_trials("few-shot", [MODEL], ["dcp"])), key=lambda c: -c.seconds)
    total = sum(c.seconds for c in costs)
    print(f"DCP: {sum(c.trial.steps for c in costs):,} steps")
    for c in costs[:12:3]:
        print(f"{c.trial.key}: {c.trial.steps:,} steps, {c.seconds / 60:.0f} min")
    for name in dict.fromkeys(c.trial.dataset for c in costs):
        print(f"{name}: {sum(c.seconds for c in costs if c.trial.dataset == name) / total:.0%} of the time")
    for speed in (8, 30, 100, 300):  # 8: a laptop without a GPU
        for row in table(["dcp"], Assumptions(speed=speed)):
            if row["order"] == "longest first" and row["gpus"] in (1, 8, 64):
                print(f"{speed} cores: {row['gpus']} GPUs, {row['hours']} h, efficiency {row['efficiency']}")


if __name__ == "__main__":
    main()
