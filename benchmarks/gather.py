"""Gather the trials in `benchmarks/results/trials` into the CSV files used by the documentation.

A method enters the few-shot results once it has all shots and seeds: averages of fewer do not compare.
"""

from pathlib import Path

import pandas as pd

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import PROTOCOLS, SEEDS
from dcp_zoo.methods import METHODS

RESULTS = Path(__file__).parent / "results"
COMPARED = ["", "coupling=text_to_vision"]  # both couplings are measured at all shots


def is_complete(rows: pd.DataFrame) -> bool:
    """Whether a method has all trials of the few-shot protocol; one that does not train has one."""
    trained = {(k, seed) for k in PROTOCOLS["few-shot"].shots for seed in SEEDS}
    return trained <= {*zip(rows.shots, rows.seed, strict=True)} or not METHODS[rows.method.iloc[0]].trains


def main() -> None:
    rows = store.gather(RESULTS / "trials")
    protocols = ("few-shot", "base-to-new", "domain-shift")
    parts = {name: rows[(rows.protocol == name) & rows.options.isin(COMPARED)] for name in protocols}
    parts["few-shot"] = parts["few-shot"].groupby(["method", "options"], sort=False).filter(is_complete)
    few_shot = rows[rows.protocol == "few-shot"]
    changed = few_shot[(few_shot.method == "dcp") & (few_shot.shots == 4)]
    if changed.options.nunique() > 1:  # the default alone is no comparison
        parts["ablations"] = changed
    for name, part in parts.items():
        if len(part):
            part.to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
