"""Sweeps and training that are killed: whether anything is lost or done twice. Real trials, on pictures made here.

    python benchmarks/resilience.py                     all, the results in results/resilience.csv
    python benchmarks/resilience.py --only ray

killed: a sweep in a process of its own is ended by SIGKILL at random moments and started again, until it comes to its
end. training: a training run is killed at random moments and started again, until it comes to its end; "lost" says that
its weights or its log differ by a bit from those of a run that nobody killed, "repeated" counts steps that are twice in
the log. ray: 30 trials on a local Ray cluster, and one of the workers is ended by SIGKILL in the middle of a trial.
"""

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dcp_zoo.benchmark import Settings, Trial, plan_trials, store
from dcp_zoo.benchmark.images import images_of
from dcp_zoo.benchmark.ray_backend import run_on_ray
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.cli.console import output as console
from dcp_zoo.data import few_shot, load_split
from dcp_zoo.model.checkpoint import WEIGHTS_NAME
from dcp_zoo.training.loop import open_log, train
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.training.sources import ImageSource, image_source
from dcp_zoo.training.state import STATE_NAME, TrainingState
from dcp_zoo.zoo.factory import create_model

CSV = Path(__file__).parent / "results" / "resilience.csv"
RECIPE = Recipe(optimizer="adamw", lr=1e-3, batch_size=4, epochs=6, n_ctx=4, augment="flip")  # 30 steps of 20 images
COLUMNS = ("test", "round", "trials", "kills", "results", "lost", "repeated", "seconds")


def make_pictures(folder: Path, classes: int = 3, each: int = 10) -> Path:
    """Noise in one colour a class."""
    random_numbers = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"colour {label}").mkdir(parents=True)
        for i in range(each):
            pixels = random_numbers.integers(0, 90, (64, 64, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(folder / f"colour {label}" / f"{i}.png")
    return folder


def short_trials(seeds: int) -> list[Trial]:
    return plan_trials("few-shot", methods=["linear-probe"], datasets=["folder"], shots=[1], seeds=range(1, seeds + 1))


def files(output: Path) -> dict[str, tuple[int, bytes]]:
    """When each finished trial was written, and what."""
    return {path.stem: (path.stat().st_mtime_ns, path.read_bytes()) for path in (output / "results").glob("[!.]*.json")}


# --------------------------------------------------------------------------------------------------- killed and resumed


def killed_round(number: int, trials: Sequence[Trial], settings: Settings, chance: random.Random) -> dict:
    """Kill a sweep again and again at random moments, each time after more patience, until it ends by itself."""
    started, kills, patience = time.monotonic(), 0, 0.5
    written: dict[str, tuple[int, bytes]] = {}
    repeated: set[str] = set()
    while not run_or_kill(lambda: sweep(trials, settings), chance.uniform(0, patience)):
        kills, patience = kills + 1, patience * 1.3
        now = files(settings.output)
        repeated |= {key for key in written if now.get(key) != written[key]}
        written = now
    now = files(settings.output)
    repeated |= {key for key in written if now.get(key) != written[key]}
    lost = {trial.key for trial in trials} - now.keys()
    return row("killed", number, trials, kills, len(now), len(lost), len(repeated), started)


def run_or_kill(work: Callable[[], Any], seconds: float) -> bool:
    """Work in a fork of this process, which has all imports; whether it ended before it was killed. Work returns what
    failed."""
    child = os.fork()
    if child == 0:
        failed: Any = True
        try:
            failed = work()
        except Exception:
            traceback.print_exc()
        finally:  # what the parent has open, such as its temporary folder, is the parent's to close
            os._exit(bool(failed))
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    timer.cancel()
    if status > 0:
        raise SystemExit("a run failed")
    return status == 0


# ------------------------------------------------------------------------------------------------------------- training


def training_source() -> ImageSource:
    """Twenty digits and a fresh miniature; every fork trains its own copy."""
    subset = few_shot(load_split("digits"), 2, 1)
    torch.manual_seed(1)
    model = create_model("dcp_mini", "clip", classnames=subset.classnames)
    return image_source(model, subset.train, "flip")


def train_in(folder: Path, source: ImageSource) -> None:
    folder.mkdir(exist_ok=True)
    with open_log(folder / "log.csv") as log:
        train(source, RECIPE, log=log, state=TrainingState(folder / STATE_NAME, every=0))
    source.model.save_pretrained(folder, torch.float32)


def training_round(number: int, source: ImageSource, reference: Path, folder: Path, chance: random.Random) -> dict:
    """Kill one training run again and again at random moments, until it ends by itself."""
    started, kills, patience = time.monotonic(), 0, 0.5
    while not run_or_kill(lambda: train_in(folder, source), chance.uniform(0, patience)):
        kills, patience = kills + 1, patience * 1.3
    steps = logged(folder)
    same = steps == logged(reference) and weights(folder) == weights(reference)
    return row("training", number, [folder], kills, int(same), int(not same), len(steps) - len(set(steps)), started)


def logged(folder: Path) -> list[str]:
    """The log without its last column, the seconds."""
    return [line.rpartition(",")[0] for line in (folder / "log.csv").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS_NAME).read_bytes()


# ------------------------------------------------------------------------------------------------------------------ ray


def ray_round(trials: Sequence[Trial], settings: Settings) -> dict:
    """Kill the first worker that is found at work once a third of the trials are done."""
    started, states, kills = time.monotonic(), Counter[str](), 0
    for event in run_on_ray(trials, settings):
        states[event.state] += 1
        console.print(event.state, event.trial.key, event.message, highlight=False)
        if event.state == "running" and states["done"] >= len(trials) // 3 and not kills:
            kills += kill_a_worker()
    results = store.done(settings.output)
    lost = {trial.key for trial in trials} - results
    return row("ray", 1, trials, kills, len(results), len(lost), states["done"] - len(results), started)


def kill_a_worker() -> int:
    """End a process that runs a task, as Linux shows it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if path.read_bytes().startswith(b"ray::execute"):
            os.kill(int(path.parent.name), signal.SIGKILL)
            return 1
    return 0


def row(test: str, number: int, trials: Sequence[Any], *values: float) -> dict:
    *counts, started = values
    return dict(zip(COLUMNS, (test, number, len(trials), *counts, round(time.monotonic() - started, 1)), strict=True))


def save(path: Path, rows: list[dict]) -> None:
    """Replace the rows of the tests that were run."""
    old = list(csv.DictReader(path.open())) if path.exists() else []
    tests = {row["test"] for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*(row for row in old if row["test"] not in tests), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("killed", "training", "ray"))
    parser.add_argument("--rounds", type=int, default=20, help="of killed sweeps and training runs")
    parser.add_argument("--trials", type=int, default=6, help="of each killed sweep")
    parser.add_argument("--csv", type=Path, default=CSV)
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        photos, chance = make_pictures(Path(temporary) / "photos"), random.Random(0)
        if chosen.only in (None, "training"):
            source, reference = training_source(), Path(temporary) / "reference"
            run_or_kill(lambda: train_in(reference, source), 1e6)
            for number in range(1, chosen.rounds + 1):
                folder = Path(temporary) / f"training {number}"
                rows.append(training_round(number, source, reference, folder, chance))
                console.print(rows[-1], highlight=False)
        if chosen.only in (None, "killed"):
            images_of("dcp_mini", "auto", photos, 0)  # once, for all forks
            for number in range(1, chosen.rounds + 1):
                settings = Settings(Path(temporary) / str(number), photos)
                rows.append(killed_round(number, short_trials(chosen.trials), settings, chance))
                console.print(str(rows[-1]), soft_wrap=True, highlight=False)
        if chosen.only in (None, "ray"):
            rows.append(ray_round(short_trials(30), Settings(Path(temporary) / "ray", photos)))
            console.print(str(rows[-1]), soft_wrap=True, highlight=False)
    save(chosen.csv, rows)
    sys.exit(any(row["lost"] or row["repeated"] for row in rows))


if __name__ == "__main__":
    main()
