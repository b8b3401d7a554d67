"""The tables of a report. Every function takes gathered results, one row per measured accuracy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dcp_zoo.data import DATASETS
from dcp_zoo.errors import import_extra
from dcp_zoo.training.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

IDENTITY = "protocol,model,weights,method,options,dataset,shots,seed,target,classes,stats".split(",")
NONE = "-"
SPREAD = "Mean ± standard deviation over seeds; without ± there is only one seed."
INCOMPLETE = "A method without results for one of the datasets has no average."


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def labelled(results: "pd.DataFrame") -> "pd.DataFrame":
    """The results with a column `label`, in a fixed order and without duplicates.

    A label is the method with its changed options and, for results with the batch statistics of a method that also has
    calibrated ones, the word "batch". If several folders have a result, the last one is used.
    """
    results = results.drop_duplicates(IDENTITY, keep="last").copy()
    results["options"] = results["options"].astype(object).fillna("")  # read as numbers if all are empty
    calibrated = set(results.loc[results.stats == "stored", "method"])
    results["label"] = [
        title(method)
        + (f" ({options})" if options else "")
        + (", batch" if stats == "batch" and method in calibrated else "")
        for method, options, stats in zip(results.method, results.options, results.stats, strict=True)
    ]
    results["rank"] = results.method.map(_ranks(METHODS, results.method))
    return results.sort_values(["rank", "label", "shots", "seed"], kind="stable")


def title(method: str) -> str:
    """The method's title as in papers; a method unknown to this version keeps its name."""
    return METHODS[method].title if method in METHODS else method


def _ranks(known: Iterable[str], found: Iterable[str]) -> dict[str, int]:
    """Sort keys: names in the project's tables first, in table order, then the others by name."""
    known = list(known)
    names = [*known, *sorted(set(found) - set(known))]
    return {name: i for i, name in enumerate(names)}


def datasets_of(results: "pd.DataFrame", column: str = "dataset") -> list[str]:
    """The datasets in a column, in the order of the project's table."""
    ranks = _ranks(DATASETS, results[column])
    return sorted(results[column].unique(), key=ranks.__getitem__)


def averaged(results: "pd.DataFrame", value: str, over: str = "dataset") -> "pd.DataFrame":
    """Means over all datasets for each label, shots and seed; omitted if one of the datasets is missing."""
    groups = results.groupby(["label", "shots", "seed"], sort=False)[value].agg(["mean", "count"])
    complete = groups[groups["count"] == results[over].nunique()]
    return complete["mean"].rename(value).reset_index()


def cell(values: "pd.Series", digits: int = 1) -> str:
    """Mean and, with more than one value, standard deviation."""
    values = values.dropna()
    if values.empty:
        return NONE
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def grid(
    results: "pd.DataFrame",
    caption: str,
    column: str,
    columns: Sequence,
    value: str = "top1",
    note: str = SPREAD,
    labels: Iterable[str] | None = None,
) -> Table:
    """One row per label (default: all in the results), and one column for each of `columns`, values of `column`."""
    digits = 2 if value == "nll" else 1  # it is no percentage
    cells = {key: cell(group, digits) for key, group in results.groupby(["label", column])[value]}
    shown = results.label.unique() if labels is None else labels
    rows = [[label, *(cells.get((label, c), NONE) for c in columns)] for label in shown]
    return Table(caption, ["method", *map(str, columns)], rows, note)


# ----------------------------------------------------------------------------------------------------------- protocols


def few_shot(results: "pd.DataFrame", value: str = "top1") -> list[Table]:
    """One table for the average over datasets, if there are several, and one per dataset: methods by shots, with the
    images that their hyperparameters were chosen on."""
    results = results[results.protocol == "few-shot"].dropna(subset=[value])
    names, shots = datasets_of(results), sorted(results.shots.unique())
    tables = [grid(results[results.dataset == name], name, "shots", shots, value) for name in names]
    if len(names) > 1:
        means, labels = averaged(results, value), results.label.unique()
        tables.insert(0, grid(means, _average(names), "shots", shots, value, f"{SPREAD} {INCOMPLETE}", labels))
    return [_with_selection(table, results) for table in tables]


def _with_selection(table: Table, results: "pd.DataFrame") -> Table:
    """The table with a column that says which images hyperparameters were chosen on."""
    found = results.groupby("label").selection.unique()
    rows = [[row[0], " / ".join(sorted(found[row[0]])), *row[1:]] for row in table.rows]
    return replace(table, header=[table.header[0], "selection", *table.header[1:]], rows=rows)


def base_to_new(results: "pd.DataFrame") -> list[Table]:
    """Base, new and their harmonic mean H, per dataset and on average."""
    results = with_shots(results[results.protocol == "base-to-new"])
    names = datasets_of(results)
    tables = [_base_new_h(results[results.dataset == name], name) for name in names]
    if len(names) > 1:
        parts = [averaged(results[results.classes == c], "top1").assign(classes=c) for c in ("base", "new")]
        means = import_extra("pandas", "plots").concat(parts)
        tables.insert(0, _base_new_h(means, _average(names), INCOMPLETE, results.label.unique()))
    return tables


def _average(names: Sequence[str]) -> str:
    return f"Average of {len(names)} datasets"


def _base_new_h(results: "pd.DataFrame", caption: str, note: str = "", labels: Iterable[str] | None = None) -> Table:
    table = grid(results, caption, "classes", ["base", "new"], labels=labels)
    means = results.groupby(["label", "classes"]).top1.mean().unstack().reindex(columns=["base", "new"])
    harmonic = (2 / (1 / means.base + 1 / means.new)).dropna()
    rows = [[*row, f"{harmonic[row[0]]:.1f}" if row[0] in harmonic else NONE] for row in table.rows]
    return Table(
        caption, [*table.header, "H"], rows, f"{SPREAD} H is the harmonic mean of the two means. {note}".strip()
    )


def by_target(results: "pd.DataFrame", protocol: str) -> list[Table]:
    """One table per training dataset: methods by test datasets."""
    results = with_shots(results[results.protocol == protocol])
    tables = []
    for source in datasets_of(results):
        rows = results[results.dataset == source]
        targets = [name for name in datasets_of(rows, "target") if name != source]
        table = grid(
            rows,
            f"Trained on {source}",
            "target",
            [*([source] if source in set(rows.target) else []), *targets],
            "top1",
        )
        means = averaged(rows[rows.target.isin(targets)], "top1", over="target")
        means = {label: cell(group) for label, group in means.groupby("label").top1}
        tables.append(
            Table(
                table.caption,
                [*table.header, "average of targets"],
                [[*row, means.get(row[0], NONE)] for row in table.rows],
                f"{SPREAD} The average is over {len(targets)} targets, without {source} itself.",
            )
        )
    return tables


def with_shots(results: "pd.DataFrame") -> "pd.DataFrame":
    """Adds the number of shots to the label, for tables without a column for it."""
    shots = results.shots.map(lambda k: {0: "", 1: ", 1 shot"}.get(k, f", {k} shots"))
    return results.assign(label=results.label + shots)


# ---------------------------------------------------------------------------------------------------------- comparisons


def options_against_default(results: "pd.DataFrame") -> list[Table]:
    """The effect of changed options: differences from the unchanged method, paired by seed and everything else."""
    pair = [name for name in IDENTITY if name != "options"]
    merged = results.merge(results[results.options == ""], on=pair, suffixes=("", "_default"))
    merged = merged[merged.options != ""]
    rows = []
    for (protocol, label), group in merged.groupby(["protocol", "label"], sort=False):
        time = group.train_seconds.mean() / group.train_seconds_default.mean()
        row = [label, protocol, str(len(group)), f"{group.top1_default.mean():.2f}", f"{group.top1.mean():.2f}"]
        rows.append([*row, _signed(group.top1 - group.top1_default), NONE if time != time else f"{time:.2f} x"])
    header = ["method (changed options)", "protocol", "pairs", "unchanged", "changed", "difference", "training time"]
    note = "A pair has the same dataset, shots, seed, target and stats. Top-1 in percent, difference in points."
    return [Table("Changed options against the unchanged method", header, rows, note)] if rows else []


def _signed(values: "pd.Series") -> str:
    return f"{values.mean():+.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def runs(results: "pd.DataFrame") -> Table:
    """All settings, with the accuracy of each seed."""
    seeds = sorted(set(results.seed) - {0})
    by = ["protocol", "label", "dataset", "target", "classes", "shots"]
    rows = []
    for key, group in results.groupby(by, sort=False):
        values = group.set_index("seed").top1
        numbers = [values.get(seed) for seed in seeds] + [values.mean(), values.std()]
        numbers += [group.ece.mean(), group.nll.mean(), group.train_seconds.mean()]
        rows.append(
            [key[1], key[0], *map(str, key[2:]), *(NONE if x is None or x != x else f"{x:.2f}" for x in numbers)]
        )
    header = ["method", "protocol", "trained on", "tested on", "classes", "shots"]
    header += [*(f"seed {s}" for s in seeds), "mean", "std", "ECE", "NLL", "train s"]
    note = (
        "Top-1 and expected calibration error (ECE) in percent, negative log-likelihood (NLL) in nats; std over seeds; "
        "training time in seconds, mean over seeds."
    )
    return Table("All settings", header, rows, note)
