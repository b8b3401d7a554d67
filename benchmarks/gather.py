"""Gather the trials in `benchmarks/results/trials` into the CSV files used by the documentation.

A method enters the few-shot results once it has all shots and three seeds, the same for all: averages over other draws
of the training images do not compare. Results on ten draws are in a file of their own.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import PROTOCOLS, SEEDS
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import NO_CLASSIFIER, TEXT_PROBE

RESULTS = Path(__file__).parent / "results"
TEN = range(1, 11)  # draws of methods that only read features
FAST = "flat_epochs=3,prompted_blocks=3,share_of_steps=0.5"  # what it changes in the miniature's recipe
FAST_COLUMNS = ["weights", "recipe", "dataset", "shots", "seed", "top1", "ece", "train_seconds"]
COMPARED = ["", "coupling=text_to_vision"]  # both couplings are measured at all shots


def is_complete(rows: pd.DataFrame, seeds: Iterable[int] = SEEDS) -> bool:
    """Whether a method has all trials of the few-shot protocol; one that does not train has one."""
    trained = {(k, seed) for k in PROTOCOLS["few-shot"].shots for seed in seeds}
    return trained <= {*zip(rows.shots, rows.seed, strict=True)} or not METHODS[rows.method.iloc[0]].trains


def factorial(rows: pd.DataFrame) -> pd.DataFrame:
    """Methods with and without the text probe on the same training images: both of one trial where prompts or
    weights were trained, of two where it was only a classifier on features."""
    rows = rows[rows.stats != "batch"]
    staged = rows[rows.options == f"classifier={TEXT_PROBE}"]
    staged = pd.concat([staged, rows[(rows.method == "dcp") & (rows.options == "")]])
    alone = rows[(rows.options == "") & (rows.stats == "") & rows.method.isin(staged.method[staged.stats == ""])]
    joined = pd.concat([staged, alone])
    own = (joined.stats == NO_CLASSIFIER) | (joined.options == "") & (joined.stats == "")
    joined = joined.assign(classifier=own.map({True: "none", False: TEXT_PROBE}))
    probe = rows[(rows.method == TEXT_PROBE) & (rows.options == "")]
    nothing = (
        rows[rows.method == "zero-shot"].drop(columns=["shots", "seed"]).merge(probe[["shots", "seed"]], how="cross")
    )
    joined = pd.concat(
        [joined, nothing.assign(classifier="none"), probe.assign(method="zero-shot", classifier=TEXT_PROBE)]
    )
    columns = ["weights", "method", "classifier", "dataset", "shots", "seed", "top1", "ece", "train_seconds"]
    return joined[columns].sort_values(columns[1:6])


def main() -> None:
    rows = store.gather(RESULTS / "trials")
    protocols = ("few-shot", "base-to-new", "domain-shift")
    parts = {name: rows[(rows.protocol == name) & rows.options.isin(COMPARED)] for name in protocols}
    complete = parts["few-shot"].groupby(["method", "options"], sort=False)
    parts["few-shot-ten-draws"] = complete.filter(is_complete, seeds=TEN)
    parts["few-shot"] = complete.filter(is_complete)
    parts["few-shot"] = parts["few-shot"][parts["few-shot"].seed.isin([0, *SEEDS])]
    few_shot = rows[rows.protocol == "few-shot"]
    changed = few_shot[(few_shot.method == "dcp") & (few_shot.shots == 4) & (few_shot.options != FAST)]
    # those that were measured with the present text probe
    changed = changed.groupby("options").filter(lambda rows: (rows.stats == NO_CLASSIFIER).any())
    if changed.options.nunique() > 1:  # the default alone is no comparison
        parts["ablations"] = changed
    parts["factorial"] = factorial(few_shot)
    measured = few_shot.shots.isin(few_shot.shots[few_shot.options == FAST]) & (few_shot.stats == "stored")
    fast = few_shot[(few_shot.method == "dcp") & measured & few_shot.options.isin(["", FAST])]
    parts["fast"] = fast.assign(recipe=fast.options.map({"": "default", FAST: "fast"}))[FAST_COLUMNS]
    for name, part in parts.items():
        if len(part):
            part.to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
