"""Kill `dcp-zoo build` at random moments, and check that every head is published once all the same.

    PYTHONPATH=tests python benchmarks/kill_builds.py          until results/builds.csv has four rounds

One head for each of the 11 datasets, with three classes and a few images each, on a Hub of the tests. In every round a
build is killed at seven random moments (three in the first two rounds) and then finishes; "lost" counts heads that are
not published then, "repeated" heads with more than one commit.
"""

import argparse
import contextlib
import csv
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import small_zoo
from upload_hub import TOKEN, serve_uploads

HERE = Path(__file__).parent

COLUMNS = ("round", "kills", "heads", "lost", "repeated", "seconds")
KILLS, NEXT = 7, 4  # the next kill comes after at most so many results and publications
FEW = ["--models", "dcp_mini", "--shots", "1", "--seeds", "1", "--org", "our-org"]


def kill_round(number: int, data: Path, folder: Path, chance: random.Random) -> dict[str, object]:
    """Builds from nothing, killed and finished."""
    started, kills = time.monotonic(), 0
    command = ["build", *FEW, "--data-root", str(data), "--output", str(folder / "BUILD")]
    with serve_uploads() as hub:
        use(hub.url)
        for _ in range(KILLS):
            goal = count(folder) + chance.randint(1, NEXT)
            kills += not small_zoo.finish_or_kill(command, lambda goal=goal: count(folder) >= goal, chance)
        small_zoo.finish_or_kill(command, lambda: False, chance)
        commits = hub.published()
    heads = list(folder.glob("BUILD/published/*.json"))
    lost = 11 - sum(commits.get(f"our-org/{path.stem}", 0) >= 1 for path in heads)
    repeated = sum(n > 1 for n in commits.values())
    values = (number, kills, len(heads), lost, repeated, round(time.monotonic() - started, 1))
    return dict(zip(COLUMNS, values, strict=True))


def use(url: str) -> None:
    """What HF_ENDPOINT does in a new process; the forks inherit it."""
    import huggingface_hub

    huggingface_hub.constants.ENDPOINT = url
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    os.environ["HF_TOKEN"] = TOKEN


def count(folder: Path) -> int:
    """Results and publications so far."""
    return sum(len(list(folder.glob(f"BUILD/{kind}/*.json"))) for kind in ("results", "published"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "builds.csv")
    chosen = parser.parse_args()
    rows = list(csv.DictReader(chosen.csv.open())) if chosen.csv.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        small_zoo.shrink(small_zoo.write_manifest(root))
        small_zoo.write_data(root / "DATA")
        for number in range(len(rows) + 1, chosen.rounds + 1):
            with contextlib.redirect_stdout(sys.stderr):
                rows.append(kill_round(number, root / "DATA", root / str(number), random.Random(number)))
            print(rows[-1], flush=True)
            with chosen.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    sys.exit(any(int(row["lost"]) or int(row["repeated"]) for row in rows))


if __name__ == "__main__":
    main()
