"""Kill commands at random moments, and check that they leave the old state or the new one, and work afterwards.

    PYTHONPATH=tests:hub python benchmarks/kills.py                   30 kills of each command: results/kills.csv
    PYTHONPATH=tests:hub python benchmarks/kills.py --only saves      500 saves of five processes into one folder
    PYTHONPATH=tests:hub python benchmarks/kills.py --only builds     until results/builds.csv has four rounds

"old" and "new" count the states that kills left, "third" any other, and "broken" commands that did not lead to the new
state when they were repeated. Every second kill comes at most 30 ms after the first change in the folder, the others
between a quarter of the command's time, when it has started, and its end. Of saves, "third" are heads with the weights
of one save and the classes of another, as a reader sees them all the while, and "old" counts reads that are told to try
again. In every round of builds, with one head for each of the 11 datasets on a Hub of the tests, a build is killed at
seven random moments (three in the first two rounds) and then finishes; "lost" counts heads that are not published then,
"repeated" heads with more than one commit.
"""

import argparse
import csv
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import publish
import small_zoo
from PIL import Image
from upload_hub import serve_uploads

import dcp_zoo
from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of
from dcp_zoo.model.checkpoint import WEIGHTS_NAME, read_tensors
from dcp_zoo.model.config import read_config

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("what", "kills", "old", "new", "third", "broken", "seconds")
SAVES, SAVERS = 500, 5


class Case(NamedTuple):
    """A command whose folder PLACE is copied for every kill, and what its state is read from."""

    start: Path  # the folder before the command
    args: list[str]  # with {} for the copy
    state: Callable[[Path], Any]


def draw(folder: Path, colours: dict[str, tuple[int, int, int]], each: int = 6) -> Path:
    """Images of one colour per class."""
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (40 + i, 40), tuple(max(0, part - 9 * i) for part in colour)).save(
                folder / name / f"{i}.png"
            )
    return folder


def cases(root: Path) -> dict[str, Case]:
    """The commands that are killed, on data in `root`."""
    photos = draw(root / "photos", {"red": (250, 60, 60), "blue": (60, 60, 250), "green": (60, 250, 60)})
    zebras = draw(root / "zebras", {"zebra": (250, 250, 250)}) / "zebra"
    small, big, empty = root / "small" / "head", root / "big" / "head", root / "empty"
    empty.mkdir()
    for args in (
        ["train", str(photos), "--test", "0", "--output", str(small)],
        ["classes", str(small), "--add", "zebra", str(zebras), "--output", str(big)],
    ):
        small_zoo.finish_or_kill(args, lambda: False)
    editing = ["classes", "{}/head", "--output", "{}/head", "--overwrite"]
    return {
        "train --overwrite": Case(
            big.parent, ["train", str(photos), "--test", "0", "--output", "{}/head", "--overwrite"], head
        ),
        "classes add": Case(small.parent, [*editing, "--add", "zebra", str(zebras)], head),
        "classes remove": Case(big.parent, [*editing, "--remove", "zebra"], head),
        "export": Case(empty, ["export", "--head", str(small), "--output", "{}/head.onnx"], tree),
    }


def head(place: Path) -> object:
    """The classes and the weights of the head, which loads."""
    model = dcp_zoo.create_model(f"local-dir:{place / 'head'}", True)
    return tuple(model.classnames), sha256_of(place / "head" / WEIGHTS_NAME)


def tree(place: Path) -> dict[str, str]:
    """The files, those in OUTPUT.unfinished left out."""
    names = {str(path.relative_to(place)): path for path in place.rglob("*") if path.is_file()}
    names = {name: path for name, path in names.items() if ".unfinished" not in name}
    return {name: sha256_of(path) for name, path in sorted(names.items())}


def names(place: Path) -> dict[str, int]:
    """What is in a folder and when it was changed, locks left out."""
    with suppress(FileNotFoundError):  # of a file that goes just now
        return {
            str(path): path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file() and path.name != ".lock"
        }
    return {}


def has_changed(place: Path, before: dict[str, int]) -> bool:
    return names(place) != before


def run_case(case: Case, kills: int, root: Path, chance: random.Random) -> dict[str, int]:
    """The counts of `COLUMNS`."""

    def begin(name: str) -> tuple[Path, list[str]]:
        place = Path(shutil.copytree(case.start, root / name))
        return place, [part.replace("{}", str(place)) for part in case.args]

    old = case.state(case.start)
    place, args = begin("whole")
    started = time.monotonic()
    small_zoo.finish_or_kill(args, lambda: False)
    seconds, new = time.monotonic() - started, case.state(place)
    assert new != old
    counts = Counter(old=0, new=0, third=0, broken=0)
    while counts["old"] + counts["new"] + counts["third"] < kills:
        place, args = begin(f"killed {counts.total()}")
        end = time.monotonic() + chance.uniform(0.25, 1) * seconds
        until, pause = (lambda end=end: time.monotonic() > end), 0.0
        if counts.total() % 2:
            until, pause = partial(has_changed, place, names(place)), chance.uniform(0, 0.03)
        if small_zoo.finish_or_kill(args, until, pause=pause):
            shutil.rmtree(place)
            seconds *= 0.95  # it has become faster
            continue
        kind = "third"
        with suppress(ZooError, AssertionError):
            left = case.state(place)
            kind = "old" if left == old else "new" if left == new else "third"
        counts[kind] += 1
        if kind == "old":
            try:
                small_zoo.finish_or_kill(args, lambda: False)
                counts["broken"] += case.state(place) != new
            except (AssertionError, ZooError) as error:
                print(error, file=sys.stderr)
                counts["broken"] += 1
        shutil.rmtree(place)
    return {"kills": kills, **counts}


# ---------------------------------------------------------------------------------------------------- concurrent saves


def save(folder: Path, number: int, times: int) -> None:
    """Saves of heads whose weights all are the number of the save, and whose first class is named after it."""
    model = dcp_zoo.create_model("dcp_mini", classnames=["0", "other"])
    for i in range(number * times, (number + 1) * times):
        model.prompts["text"].data.fill_(i / 1024)
        model.set_classnames([str(i), "other"])
        model.save_pretrained(folder)


def read(folder: Path) -> str:
    """Which of old, new and third the head in the folder is; "old" if a save came between reading its two files."""
    try:
        config = read_config(folder)
        weights = read_tensors(folder, config["weights_sha256"])["prompts.text"]
    except ZooError:
        return "old"
    return "new" if (weights * 1024 == int(config["label_names"][0])).all() else "third"


def run_saves(folder: Path, saves: int, savers: int) -> dict[str, int]:
    """The counts of `COLUMNS`."""
    work = [small_zoo.SERVER.Process(target=save, args=(folder, i, saves // savers)) for i in range(savers)]
    for process in work:
        process.start()
    counts = Counter(old=0, new=0, third=0)
    while any(process.is_alive() for process in work):
        if (folder / "config.json").exists():
            counts[read(folder)] += 1
        time.sleep(0.01)
    counts[kind := read(folder)] += 1
    broken = sum(process.exitcode != 0 for process in work) + (kind != "new")
    return {"kills": 0, **counts, "broken": broken}


# -------------------------------------------------------------------------------------------------------------- builds

BUILDS = ("round", "kills", "heads", "lost", "repeated", "seconds")
KILLS, NEXT = 7, 4  # the next kill comes after at most so many results and publications
FEW = ["--models", "dcp_mini", "--shots", "1", "--seeds", "1", "--org", "our-org"]


def kill_builds(number: int, data: Path, folder: Path, chance: random.Random) -> dict[str, object]:
    """Builds from nothing, killed and finished."""
    started, kills = time.monotonic(), 0
    command = [*FEW, "--data-root", str(data), "--output", str(folder / "BUILD")]

    def count() -> int:
        """Results and publications so far."""
        return sum(len(list(folder.glob(f"BUILD/{kind}/*.json"))) for kind in ("results", "published"))

    with serve_uploads() as hub:
        prepare = partial(small_zoo.prepare_build, publish.MANIFEST, hub.url)
        for _ in range(KILLS):
            goal = count() + chance.randint(1, NEXT)
            until = partial(lambda goal: count() >= goal, goal)
            kills += not small_zoo.finish_or_kill(command, until, prepare, chance.random() / 5, "build")
        small_zoo.finish_or_kill(command, lambda: False, prepare, program="build")
        commits = hub.published()
    heads = list(folder.glob("BUILD/published/*.json"))
    lost = 11 - sum(commits.get(f"our-org/{path.stem}", 0) >= 1 for path in heads)
    repeated = sum(n > 1 for n in commits.values())
    values = (number, kills, len(heads), lost, repeated, round(time.monotonic() - started, 1))
    return dict(zip(BUILDS, values, strict=True))


# --------------------------------------------------------------------------------------------------------------- tables


def write(path: Path, rows: list[dict]) -> None:
    print(rows[-1], flush=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_builds(path: Path, rounds: int, root: Path) -> bool:
    rows: list[dict] = list(csv.DictReader(path.open())) if path.exists() else []
    small_zoo.shrink(small_zoo.write_manifest(root))
    small_zoo.write_data(root / "DATA")
    for number in range(len(rows) + 1, rounds + 1):
        with redirect_stdout(sys.stderr):
            rows.append(kill_builds(number, root / "DATA", root / str(number), random.Random(number)))
        write(path, rows)
    return any(int(row["lost"]) or int(row["repeated"]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="builds, saves, or one of the commands")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the same weights every time
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if chosen.only == "builds":
            sys.exit(write_builds(chosen.csv or RESULTS / "builds.csv", 4, root))
        rows: list[dict[str, Any]] = []
        with redirect_stdout(sys.stderr):
            killed = {} if chosen.only == "saves" else cases(root / "data")
        for name in (*killed, "saves"):
            if chosen.only in (None, name):
                started = time.monotonic()
                if name == "saves":
                    counts = run_saves(root / "saved", SAVES, SAVERS)
                else:
                    counts = run_case(killed[name], chosen.kills, root / name.replace(" ", "_"), random.Random(0))
                rows.append({"what": name, **counts, "seconds": round(time.monotonic() - started, 1)})
                write(chosen.csv or RESULTS / "kills.csv", rows)
    sys.exit(any(row["third"] or row["broken"] for row in rows))


if __name__ == "__main__":
    main()
