"""The leaderboard: one table of this project's few-shot results and of those submitted by others, which sorts and
filters in the browser without a network (itables, which brings DataTables)."""

import json
from pathlib import Path

import itables
import pandas as pd
from itables.javascript import generate_init_offline_itables_html

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "few-shot.csv"
SUBMITTED = ROOT / "benchmarks" / "leaderboard"
SETUP = ["dataset", "shots", "model", "method", "options", "stats"]
OWN = "dcp_zoo"


def leaderboard() -> str:
    """The HTML of the table."""
    rows = pd.concat([own_rows(RESULTS), *map(submitted_row, sorted(SUBMITTED.glob("*.json")))], ignore_index=True)
    rows = rows.sort_values(["dataset", "shots", "top-1"], ascending=[True, True, False])
    rows = rows.fillna("")
    options = {"pageLength": 20, "maxBytes": 0, "layout": {"topStart": None, "topEnd": "search"}}
    options["classes"] = "display compact leaderboard"
    table = itables.to_html_datatable(rows, connected=False, showIndex=False, **options)
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    return f"{generate_init_offline_itables_html(bundle)}\n{table}"


def own_rows(path: Path) -> pd.DataFrame:
    """Mean and standard deviation over seeds of every setup in a results file."""
    results = pd.read_csv(path).fillna({"options": "", "stats": ""})
    groups = results.groupby(SETUP, sort=False)
    rows = groups.agg(
        **{
            "top-1": ("top1", "mean"),
            "std": ("top1", "std"),
            "seeds": ("seed", "nunique"),
            "test images": ("images", "first"),
            "train s": ("train_seconds", "mean"),
            "selection": ("selection", "first"),
        }
    ).reset_index()
    rows["method"] = (rows.method + " " + rows.options + " " + rows.stats).str.split().str.join(" ")
    rows["source"] = OWN
    rounded = {"top-1": 2, "std": 2, "train s": 1}
    return rows.drop(columns=["options", "stats"]).round(rounded)


def submitted_row(path: Path) -> pd.DataFrame:
    """The row of one submission: what was measured here, or else what its source reports."""
    entry = json.loads(path.read_text())
    was_measured = entry["measured"] is not None
    row = {name: entry[name] for name in ("dataset", "shots", "model", "method", "selection")}
    row |= {"top-1": entry["measured"] if was_measured else entry["reported"], "seeds": len(entry["seeds"])}
    state = "submitted, measured here" if was_measured else "submitted, as reported"
    return pd.DataFrame([row | {"source": f"{state}: {entry['where']}"}])
