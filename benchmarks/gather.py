"""Gather the trials in `benchmarks/results/trials` into the CSV files used by the documentation.

A method enters the few-shot results once it has all shots and three seeds, the same for all: averages over other draws
of the training images do not compare.
"""

from pathlib import Path

import pandas as pd

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import PROTOCOLS, SEEDS
from dcp_zoo.heads.config import NO_CLASSIFIER

RESULTS = Path(__file__).parent / "results"


def is_complete(rows: pd.DataFrame) -> bool:
    """Whether a method has all trials of the few-shot protocol; one that uses no images has one."""
    trained = {(k, seed) for k in PROTOCOLS["few-shot"].shots for seed in SEEDS}
    return trained <= {*zip(rows.shots, rows.seed, strict=True)} or rows.shots.eq(0).all()


def main() -> None:
    rows = store.gather(RESULTS / "trials")
    # few-shot trials of DCP have an earlier text probe: only its own logits, which are chosen by no images, count
    few_shot_dcp = (rows.protocol == "few-shot") & (rows.method == "dcp")
    rows = rows[~few_shot_dcp | (rows.stats == NO_CLASSIFIER)]
    rows.loc[few_shot_dcp, "selection"] = "none"
    protocols = ("few-shot", "base-to-new")
    parts = {name: rows[(rows.protocol == name) & (rows.options == "")] for name in protocols}
    complete = parts["few-shot"].groupby(["method", "options"], sort=False)
    parts["few-shot"] = complete.filter(is_complete)
    for name, part in parts.items():
        if len(part):
            part.to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
