"""Gather the trials in `benchmarks/results/trials` into the CSV files that the documentation shows."""

from pathlib import Path

from dcp_zoo.benchmark import store

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    rows = store.gather(RESULTS / "trials")
    ablated = (rows.protocol == "few-shot") & (rows.method == "dcp") & (rows.shots == 4)
    series = ["", "coupling=text_to_vision", "shared=False"]  # measured at all shots, as far as run
    changed = ~rows.options.isin(series)
    parts = {name: rows[(rows.protocol == name) & ~changed] for name in ("few-shot", "base-to-new", "domain-shift")}
    for name, part in (parts | {"ablations": rows[ablated]}).items():
        if len(part):
            part.to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
