"""`FewShotClassifier.fit` beside the command line on a busy machine; the second fit and cross-validation.

    python benchmarks/loads.py --data-root DATA      writes results/loads.csv

DATA holds `pacs`. Each number is the median of some runs in fresh processes, in seconds of wall time,
while `load` other processes are busy. Run it on a machine that is otherwise idle.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pandas as pd
import typer
from train_time import write_folder

RESULTS = Path(__file__).parent / "results" / "loads.csv"
LOADS = (0, 1, 4)
FIT = """
import json, sys, time
from dcp_zoo import FewShotClassifier, list_labelled_images
folder, method, what = sys.argv[1:]
classifier = FewShotClassifier(method=method, verbose=False)
def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
def crossed():
    from sklearn.model_selection import cross_val_score
    cross_val_score(classifier, *list_labelled_images(folder), cv=3)
if what == "cross":
    times = {"cross_val_score": seconds(crossed)}
else:
    times = {"fit": seconds(lambda: classifier.fit(folder))}
if what == "twice":
    times["second fit"] = seconds(lambda: classifier.fit(folder))
print(json.dumps(times))
"""


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with pacs.")],
    runs: Annotated[int, typer.Option(help="Runs of each, whose median is taken.")] = 3,
    methods: str = "text-probe,dcp",
) -> None:
    """Time everything."""
    rows = []
    with TemporaryDirectory() as folder:
        photos = Path(folder, "MY_PHOTOS")
        write_folder(photos, data_root)
        for load in LOADS:
            for method in methods.split(","):
                with busy(load):
                    pairs = [(command(photos, method, Path(folder)), whole(photos, method)) for _ in range(runs)]
                for name, times in zip(("command line", "API"), zip(*pairs, strict=True), strict=True):
                    rows.append((load, method, name, statistics.median(times)))
        for what in ("twice", "cross"):
            found = [python(photos, "text-probe", what) for _ in range(runs)]
            for name in found[0]:
                rows.append((0, "text-probe", name, statistics.median(times[name] for times in found)))
    table = pd.DataFrame(rows, columns=["load", "method", "what", "seconds"]).round({"seconds": 2})
    table.to_csv(RESULTS, index=False)
    print(table.to_string(index=False))


@contextmanager
def busy(processes: int):
    """So many other processes compute inside this context."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def command(photos: Path, method: str, folder: Path) -> float:
    """`dcp-zoo train` without a test, as `fit` has none."""
    started = time.perf_counter()
    arguments = ("--method", method, "--test", "0", "--output", str(folder / "head"), "--overwrite")
    with TemporaryDirectory() as cache:  # no run finds the features of another
        environment = {**os.environ, "DCP_ZOO_CACHE": cache}
        words = [sys.executable, "-m", "dcp_zoo", "train", str(photos), *arguments]
        subprocess.run(words, check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


def whole(photos: Path, method: str) -> float:
    """A Python process that fits."""
    started = time.perf_counter()
    python(photos, method, "once")
    return time.perf_counter() - started


def python(photos: Path, method: str, what: str) -> dict[str, float]:
    """The times of calls in a Python process."""
    done = subprocess.run([sys.executable, "-c", FIT, str(photos), method, what], check=True, capture_output=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    typer.run(main)
