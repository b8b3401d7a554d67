"""Gather the trials in `benchmarks/results/trials` into the CSV files used by the documentation."""

from pathlib import Path

from dcp_zoo.benchmark import store

RESULTS = Path(__file__).parent / "results"
COMPARED = ["", "coupling=text_to_vision"]  # both couplings are measured at all shots


def main() -> None:
    rows = store.gather(RESULTS / "trials")
    protocols = ("few-shot", "base-to-new", "domain-shift")
    parts = {name: rows[(rows.protocol == name) & rows.options.isin(COMPARED)] for name in protocols}
    few_shot = rows[rows.protocol == "few-shot"]
    changed = few_shot[(few_shot.method == "dcp") & (few_shot.shots == 4)]
    if changed.options.nunique() > 1:  # the default alone is no comparison
        parts["ablations"] = changed
    for name, part in parts.items():
        if len(part):
            part.to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
