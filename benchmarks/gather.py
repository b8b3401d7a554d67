"""Gather the trials in `benchmarks/results/trials` into the CSV files used by the documentation."""

from pathlib import Path

from dcp_zoo.benchmark import store

RESULTS = Path(__file__).parent / "results"
COMPARED = ["", "coupling=text_to_vision"]  # both couplings are measured at all shots
LONGER = "epochs=50"


def main() -> None:
    rows = store.gather(RESULTS / "trials")
    protocols = ("few-shot", "base-to-new", "domain-shift")
    parts = {name: rows[(rows.protocol == name) & rows.options.isin(COMPARED)] for name in protocols}
    few_shot = rows[rows.protocol == "few-shot"]
    trained_longer = few_shot.method.isin(few_shot.method[few_shot.options == LONGER])
    changed = {
        "ablations": few_shot[(few_shot.method == "dcp") & (few_shot.shots == 4) & (few_shot.options != LONGER)],
        "longer-training": few_shot[trained_longer & few_shot.options.isin(["", LONGER])],
    }
    # only the default is not a comparison
    parts |= {name: part for name, part in changed.items() if part.options.nunique() > 1}
    for name, part in parts.items():
        if len(part):
            part.to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
