"""Kill sweeps and training runs, and check that nothing is lost or repeated. Real trials on generated images.

    python benchmarks/resilience.py                     all tests; results in results/resilience.csv
    python benchmarks/resilience.py --only ray

killed: a sweep in a separate process is killed by SIGKILL at random times and restarted until it finishes. training: a
training run is killed at random times and restarted until it finishes; "lost" means that its weights or log differ by
at least one bit from those of an uninterrupted run, "repeated" counts steps that occur twice in the log. predict: many
images are classified with the bundled miniature, killed and restarted in the same way; "lost" and "repeated" count the
images that are not, or more than once, in the table, or differ from an uninterrupted run. ray: 30 trials on a local Ray
cluster, with one worker killed by SIGKILL during a trial.
"""

import argparse
import csv
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dcp_zoo.answers import Predictor
from dcp_zoo.benchmark import Settings, Trial, plan_trials, store
from dcp_zoo.benchmark.sweep import shared_images, sweep, sweep_on_ray
from dcp_zoo.cli.console import output as console
from dcp_zoo.data import few_shot, load_split
from dcp_zoo.data.find import find_images
from dcp_zoo.deploy.bulk.job import Job
from dcp_zoo.deploy.bulk.on_disk import OutputFiles, run
from dcp_zoo.model.checkpoint import WEIGHTS_NAME
from dcp_zoo.model.head import Head
from dcp_zoo.training.loop import train
from dcp_zoo.training.predictor import torch_predictor
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.training.sources import ImageSource, image_source
from dcp_zoo.training.state import STATE_NAME, TrainingState
from dcp_zoo.zoo.factory import create_model

CSV = Path(__file__).parent / "results" / "resilience.csv"
RECIPE = Recipe(optimizer="adamw", lr=1e-3, batch_size=4, epochs=6, n_ctx=4, augment="flip")  # 30 steps of 20 images
COLUMNS = ("test", "round", "trials", "kills", "results", "lost", "repeated", "seconds")


def make_images(folder: Path, classes: int = 3, each: int = 10) -> Path:
    """Noise images in one colour per class."""
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
    """The modification time and content of each finished trial's file."""
    return {path.stem: (path.stat().st_mtime_ns, path.read_bytes()) for path in (output / "results").glob("[!.]*.json")}


# --------------------------------------------------------------------------------------------------- killed and resumed


def killed_round(number: int, trials: Sequence[Trial], settings: Settings, chance: random.Random) -> dict:
    """Kill a sweep repeatedly at random times, waiting longer each time, until it finishes."""
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
    """Run `work`, which returns its failures, in a fork of this process, where everything is imported. Returns whether
    it finished before it was killed, together with the processes that it had started."""
    child = os.fork()
    if child == 0:
        failed: Any = True
        try:
            os.setpgid(0, 0)
            failed = work()
        except Exception:
            traceback.print_exc()
        finally:  # skip cleanup of the parent's resources, such as its temporary folder
            os._exit(bool(failed))
    with suppress(OSError):  # the child does the same, and may have ended
        os.setpgid(child, child)
    timer = threading.Timer(seconds, os.killpg, (child, signal.SIGKILL))
    timer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    timer.cancel()
    if status > 0:
        raise SystemExit("a run failed")
    return status == 0


# ------------------------------------------------------------------------------------------------------------- training


def training_task() -> tuple[Head, ImageSource]:
    """A miniature with fresh prompts, and twenty digits; every fork trains its own copy."""
    subset = few_shot(load_split("digits"), 2, 1)
    torch.manual_seed(1)
    model = create_model("dcp_mini", "clip", classnames=subset.classnames)
    return model, image_source(model.encoder, subset.train, "flip")


def train_in(folder: Path, model: Head, source: ImageSource) -> None:
    folder.mkdir(exist_ok=True)
    train(model, source, RECIPE, state=TrainingState(folder / STATE_NAME, every=0))
    model.save_pretrained(folder, torch.float32)


def training_round(
    number: int, task: tuple[Head, ImageSource], reference: Path, folder: Path, chance: random.Random
) -> dict:
    """Kill a training run repeatedly at random times, until it finishes."""
    started, kills, patience = time.monotonic(), 0, 0.5
    while not run_or_kill(lambda: train_in(folder, *task), chance.uniform(0, patience)):
        kills, patience = kills + 1, patience * 1.3
    steps = logged(folder)
    same = steps == logged(reference) and weights(folder) == weights(reference)
    return row("training", number, [folder], kills, int(same), int(not same), len(steps) - len(set(steps)), started)


def logged(folder: Path) -> list[str]:
    """The log without its last column, the time."""
    return [line.rpartition(",")[0] for line in (folder / "log.csv").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS_NAME).read_bytes()


# -------------------------------------------------------------------------------------------------------------- predict


def predict_in(folder: Path, photos: Path, predictor: Predictor) -> None:
    outputs = OutputFiles(folder / "predictions.csv", folder / "features.npz")
    run(find_images([str(photos)]), Job(lambda: predictor, {}, batch_size=2, workers=2), outputs, part_seconds=0.05)


def predict_round(
    number: int, photos: Path, predictor: Predictor, reference: Path, folder: Path, chance: random.Random
) -> dict:
    """Kill the classification of a folder repeatedly at random times, until it finishes."""
    started, kills, patience = time.monotonic(), 0, 0.5
    while not run_or_kill(lambda: predict_in(folder, photos, predictor), chance.uniform(0, patience)):
        kills, patience = kills + 1, patience * 1.3
    expected, found = ((place / "predictions.csv").read_text().splitlines()[1:] for place in (reference, folder))
    lost = Counter(expected) - Counter(found)
    features = [np.load(place / "features.npz")["features"] for place in (reference, folder)]
    same = np.array_equal(*features)
    return row(
        "predict", number, expected, kills, len(found), lost.total() + (not same), len(found) - len(set(found)), started
    )


# ------------------------------------------------------------------------------------------------------------------ ray


def ray_round(trials: Sequence[Trial], settings: Settings) -> dict:
    """Kill the first worker found running a task once a third of the trials are done."""
    started, states, kills = time.monotonic(), Counter[str](), 0
    for event in sweep_on_ray(trials, settings):
        states[event.state] += 1
        console.print(event.state, event.item.key, event.message, highlight=False)
        if states["done"] >= len(trials) // 3 and not kills:
            kills += kill_a_worker()
    results = store.done(settings.output)
    lost = {trial.key for trial in trials} - results
    return row("ray", 1, trials, kills, len(results), len(lost), states["done"] - len(results), started)


def kill_a_worker() -> int:
    """Kill a process that runs a task, found in Linux's /proc; returns the number of killed processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if re.match(rb"ray::.*on_worker", path.read_bytes()):  # the function of `run_tasks`
            os.kill(int(path.parent.name), signal.SIGKILL)
            return 1
    return 0


def row(test: str, number: int, trials: Sequence[Any], *values: float) -> dict:
    *counts, started = values
    return dict(zip(COLUMNS, (test, number, len(trials), *counts, round(time.monotonic() - started, 1)), strict=True))


def save(path: Path, rows: list[dict]) -> None:
    """Write the rows, replacing earlier ones of the same tests."""
    old = list(csv.DictReader(path.open())) if path.exists() else []
    tests = {row["test"] for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*(row for row in old if row["test"] not in tests), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("killed", "training", "predict", "ray"))
    parser.add_argument("--rounds", type=int, default=20, help="number of killed runs of each kind")
    parser.add_argument("--trials", type=int, default=6, help="trials per killed sweep")
    parser.add_argument("--csv", type=Path, default=CSV)
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        photos, chance = make_images(Path(temporary) / "photos"), random.Random(0)
        if chosen.only in (None, "training"):
            task, reference = training_task(), Path(temporary) / "reference"
            run_or_kill(lambda: train_in(reference, *task), 1e6)
            for number in range(1, chosen.rounds + 1):
                folder = Path(temporary) / f"training {number}"
                rows.append(training_round(number, task, reference, folder, chance))
                console.print(rows[-1], highlight=False)
        if chosen.only in (None, "killed"):
            shared_images("dcp_mini", "auto", photos, "float32")  # load once for all forks
            for number in range(1, chosen.rounds + 1):
                settings = Settings(Path(temporary) / str(number), photos)
                rows.append(killed_round(number, short_trials(chosen.trials), settings, chance))
                console.print(str(rows[-1]), soft_wrap=True, highlight=False)
        if chosen.only in (None, "predict"):
            torch.set_num_threads(1)  # a fork has none of the threads that a larger number would have started
            many = make_images(Path(temporary) / "many", classes=3, each=50)
            predictor = torch_predictor(create_model("dcp_mini", True).eval(), features=True)
            reference = Path(temporary) / "predicted"
            run_or_kill(lambda: predict_in(reference, many, predictor), 1e6)
            for number in range(1, chosen.rounds + 1):
                folder = Path(temporary) / f"predict {number}"
                rows.append(predict_round(number, many, predictor, reference, folder, chance))
                console.print(str(rows[-1]), soft_wrap=True, highlight=False)
        if chosen.only in (None, "ray"):
            rows.append(ray_round(short_trials(30), Settings(Path(temporary) / "ray", photos)))
            console.print(str(rows[-1]), soft_wrap=True, highlight=False)
    save(chosen.csv, rows)
    sys.exit(any(row["lost"] or row["repeated"] for row in rows))


if __name__ == "__main__":
    main()
