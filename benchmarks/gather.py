"""Gather the trials in `benchmarks/results/trials` into the CSV files that the documentation shows."""

from pathlib import Path

from dcp_zoo.benchmark import store

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    rows = store.gather(RESULTS / "trials")
    ablated = (rows.protocol == "few-shot") & (rows.method == "dcp") & (rows.shots == 4)
    changed = ~rows.options.isin(["", "coupling=text_to_vision"])  # both couplings are measured at all shots
    parts = {name: rows[(rows.protocol == name) & ~changed] for name in ("few-shot", "base-to-new", "domain-shift")}
    if (ablated & (rows.options != "")).any():  # the default alone is no comparison
        parts["ablations"] = rows[ablated]
    for name, part in parts.items():
        if len(part):
            part.to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
