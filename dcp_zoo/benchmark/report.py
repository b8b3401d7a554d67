"""Reports on gathered results, one row per measured accuracy: tables, with differences between methods that are paired
by what they share. And a page on the predictions of a head."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dcp_zoo.benchmark import store
from dcp_zoo.data import DATASETS
from dcp_zoo.data.images import thumbnails
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.fields import Values
from dcp_zoo.files import templates, write_file
from dcp_zoo.heads.config import NO_CLASSIFIER
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import TEXT_PROBE

if TYPE_CHECKING:
    import pandas as pd

    from dcp_zoo.training.evaluation import Evaluation

EMPTY = "-"
SPREAD = "Mean ± standard deviation over seeds; without ± there is only one seed."
INCOMPLETE = "A method without results for one of the datasets has no average."


class Table(NamedTuple):
    """Rows of text; the first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def with_labels(results: "pd.DataFrame") -> "pd.DataFrame":
    """The results with a column `label`, in a fixed order and without duplicates: the method with its changed options;
    for results of a head with text probes also that; and for results with the batch statistics of a method that
    also has stored ones, the word "batch". If several folders have a result, the last one is used."""
    results = results.drop_duplicates(store.IDENTITY, keep="last").copy()
    results["options"] = results["options"].astype(object).fillna("")  # read as numbers if all are empty
    with_stored = set(results.loc[results.stats == "stored", "method"])
    staged = results[results.stats == NO_CLASSIFIER]
    with_probe = {*zip(staged.method, staged.options, strict=True)}

    def label(method: str, options: str, stats: str) -> str:
        changes = f" ({options})" if options else ""
        probe = f" + {title(TEXT_PROBE).lower()}s" * ((method, options) in with_probe and stats != NO_CLASSIFIER)
        return title(method) + changes + probe + ", batch" * (stats == "batch" and method in with_stored)

    results["label"] = list(map(label, results.method, results.options, results.stats))
    results["rank"] = results.method.map(in_order(METHODS, results.method).index)
    return results.sort_values(["rank", "label", "shots", "seed"], kind="stable")


def title(method: str) -> str:
    """The method's title as in papers; a method unknown to this version keeps its name."""
    return METHODS[method].title if method in METHODS else method


def in_order(known: Iterable[str], given: Iterable[str]) -> list[str]:
    """The given names, each once: those in a table of the project in its order, then unknown ones, sorted."""
    names = set(given)
    return [name for name in known if name in names] + sorted(names.difference(known))


def averaged(results: "pd.DataFrame", value: str = "top1", over: str = "dataset") -> "pd.DataFrame":
    """Means over all datasets for each label, part of the classes, shots and seed; omitted if a dataset is missing."""
    groups = results.groupby(["label", "classes", "shots", "seed"], sort=False)[value].agg(["mean", "count"])
    complete = groups[groups["count"] == results[over].nunique()]
    return complete["mean"].rename(value).reset_index()


def with_spread(values: "pd.Series", number: str = ".1f") -> str:
    """Mean and, with more than one value, standard deviation, in this format."""
    values = values.dropna()
    if values.empty:
        return EMPTY
    return f"{values.mean():{number}}" + (f" ± {values.std():{number.removeprefix('+')}}" if len(values) > 1 else "")


def method_table(
    results: "pd.DataFrame",
    caption: str,
    column: str,
    columns: Sequence,
    labels: Iterable[str],
    value: str = "top1",
    note: str = "",
) -> Table:
    """One row per label, and one column for each of `columns`, values of `column`."""
    number = ".2f" if value == "nll" else ".1f"  # it is no percentage
    cells = {key: with_spread(group, number) for key, group in results.groupby(["label", column])[value]}
    rows = [[label, *(cells.get((label, c), EMPTY) for c in columns)] for label in labels]
    return Table(caption, ["method", *map(str, columns)], rows, f"{SPREAD} {note}".strip())


def few_shot_tables(results: "pd.DataFrame", value: str = "top1") -> list[Table]:
    """Methods by shots, with the images that their hyperparameters were chosen on."""
    results = results[results.protocol == "few-shot"].dropna(subset=[value])
    shots, selection = sorted(results.shots.unique()), results.groupby("label").selection.unique()
    tables = []
    for caption, rows, labels, note in by_dataset(results, value):
        table = method_table(rows, caption, "shots", shots, labels, value, note)
        lines = [[row[0], " / ".join(sorted(selection[row[0]])), *row[1:]] for row in table.rows]
        tables.append(table._replace(header=[table.header[0], "selection", *table.header[1:]], rows=lines))
    return tables


def base_to_new_tables(results: "pd.DataFrame") -> list[Table]:
    """Methods by base and new classes, and the harmonic mean H of both."""
    tables = []
    for caption, rows, labels, note in by_dataset(with_shots(results[results.protocol == "base-to-new"])):
        note = f"H is the harmonic mean of the two means. {note}".strip()
        means = rows.groupby(["label", "classes"]).top1.mean().unstack().reindex(columns=["base", "new"])
        harmonic = (2 / (1 / means.base + 1 / means.new)).rename("top1").reset_index().assign(classes="H")
        both = import_extra("pandas", "plots").concat([rows, harmonic])
        tables.append(method_table(both, caption, "classes", ["base", "new", "H"], labels, note=note))
    return tables


def by_dataset(
    results: "pd.DataFrame", value: str = "top1"
) -> Iterator[tuple[str, "pd.DataFrame", Sequence[str], str]]:
    """Caption, results, labels and note of each table: of the average, if there are several datasets, and of each."""
    names = in_order(DATASETS, results.dataset)
    if len(names) > 1:
        yield f"Average of {len(names)} datasets", averaged(results, value), results.label.unique(), INCOMPLETE
    for name in names:
        rows = results[results.dataset == name]
        yield name, rows, rows.label.unique(), ""


def target_tables(results: "pd.DataFrame", protocol: str) -> list[Table]:
    """One table per training dataset: methods by test datasets, and their average."""
    results, average = with_shots(results[results.protocol == protocol]), "average of targets"
    tables = []
    for source in in_order(DATASETS, results.dataset):
        rows = results[results.dataset == source]
        targets = [name for name in in_order(DATASETS, rows.target) if name != source]
        means = averaged(rows[rows.target.isin(targets)], over="target").assign(target=average)
        columns = [*([source] if source in set(rows.target) else []), *targets, average]
        both = import_extra("pandas", "plots").concat([rows, means])
        note = f"The average is over {len(targets)} targets, without {source} itself."
        tables.append(method_table(both, f"Trained on {source}", "target", columns, rows.label.unique(), note=note))
    return tables


def with_shots(results: "pd.DataFrame") -> "pd.DataFrame":
    """Adds the number of shots to the label, for tables without a column for it."""
    shots = results.shots.map(lambda k: {0: "", 1: ", 1 shot"}.get(k, f", {k} shots"))
    return results.assign(label=results.label + shots)


def interval(differences: "pd.Series") -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of paired differences, by Student's t; None for fewer than two."""
    from scipy.stats import t

    if len(differences) < 2:
        return None
    mean, half = differences.mean(), t.ppf(0.975, len(differences) - 1) * differences.sem()
    return float(mean - half), float(mean + half)


def differences(results: "pd.DataFrame", base: "pd.DataFrame") -> "pd.DataFrame":
    """Every pair of a result and one of `base` with the same dataset, shots, seed and test classes, with a column
    `difference`: top-1 minus that of the base, in percentage points. A method without training is paired with all shots
    and seeds. Column `sample` is the dataset, or of a single dataset the seed: shots and seeds of a dataset share its
    classes and test images, and are no samples of other datasets."""
    trained = min(results.shots.max(), base.shots.max()) > 0
    same = ["dataset", "target", "classes", *(["shots", "seed"] if trained else [])]
    pairs = results.merge(base, on=same, suffixes=("", "_base"))
    seeds = pairs.filter(["seed", "seed_base"]).max(axis=1)  # without training it is 0
    sample = pairs.dataset if pairs.dataset.nunique() > 1 else seeds
    return pairs.assign(difference=pairs.top1 - pairs.top1_base, sample=sample)


def by_sample(pairs: "pd.DataFrame") -> "pd.Series":
    return pairs.groupby("sample", sort=False).difference.mean()


def difference_cell(values: "pd.Series") -> str:
    """Mean difference and its interval, marked if the interval excludes 0."""
    if (found := interval(values)) is None:
        return EMPTY if values.empty else f"{values.mean():+.1f}"
    low, high = found
    return f"{values.mean():+.1f} ({low:+.1f} to {high:+.1f})" + (" *" if low > 0 or high < 0 else "")


def against(results: "pd.DataFrame", reference: str = "DCP") -> list[Table]:
    """The few-shot protocol: every trained method minus the reference, by shots and over all of them."""
    trained = results[(results.protocol == "few-shot") & (results.shots > 0)]
    is_reference = trained.label == reference
    pairs = differences(trained[~is_reference], trained[is_reference])
    if pairs.empty:
        return []
    shots = sorted(pairs.shots.unique())
    rows = []
    for label, group in pairs.groupby("label", sort=False):
        by_shots = [difference_cell(by_sample(group[group.shots == k])) for k in shots]
        rows.append([label, str(len(group)), *by_shots, difference_cell(by_sample(group))])
    unit = "datasets" if pairs.dataset.nunique() > 1 else "seeds"
    note = (
        f"Top-1 minus that of {reference}, in percentage points: mean over pairs with the same dataset, shots and "
        f"seed, with its 95 % confidence interval over {unit} (Student's t). * the interval excludes 0."
    )
    header = ["method", "pairs", *(f"{k} shots" if k > 1 else "1 shot" for k in shots), "all"]
    return [Table(f"Differences from {reference}", header, rows, note)]


SECTIONS = {  # protocol: (heading, tables)
    "few-shot": ("Few-shot classification", lambda rows: [*few_shot_tables(rows), *against(rows)]),
    "base-to-new": ("Base-to-new generalisation", base_to_new_tables),
    "cross-dataset": ("Cross-dataset transfer", lambda rows: target_tables(rows, "cross-dataset")),
    "domain-shift": ("Domain shift", lambda rows: target_tables(rows, "domain-shift")),
}
PROBABILITIES = {"ece": "Calibration error (ECE), few-shot", "nll": "Negative log-likelihood (NLL), few-shot"}


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write a Markdown page on the results in the output folders of sweeps."""
    results = store.gather(folders)
    if results.empty:
        raise ZooError(f"No result in {', '.join(map(str, folders))}: pass the --output folder of `dcp-zoo benchmark`.")
    done = {key for folder in folders for key in store.done(folder)}
    failed = {key: reason for folder in folders for key, reason in store.failures(folder).items() if key not in done}
    sections: list[Values] = []
    for (model, weights), rows in with_labels(results).groupby(["model", "weights"]):
        protocols = [(title, make(rows)) for name, (title, make) in SECTIONS.items() if (rows.protocol == name).any()]
        protocols += [(heading, few_shot_tables(rows, value)) for value, heading in PROBABILITIES.items()]
        sections.append({"model": model, "weights": weights, "tables": [pair for pair in protocols if pair[1]]})
    pages = templates(__package__)
    pages.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    content = {"folders": folders, "accuracies": len(results), "failed": failed, "sections": sections}
    write_file(path, pages.get_template("report.md.jinja").render(content))


ENOUGH = 200  # images for a statement on probabilities: bins of fewer say nothing
PICTURES, SIDE = 60, 240  # mistakes shown, and the pixels of their longer side


def write_mistakes(evaluation: "Evaluation", path: Path, title: str) -> None:
    """Write the page on the predictions of a head, with this heading."""
    from dcp_zoo.training.evaluation import expected_calibration_error, negative_log_likelihood, reliability

    answers = evaluation.logits, evaluation.labels
    content = {"title": title, "answers": evaluation, "bins": reliability(*answers), "fewest": ENOUGH}
    content |= {"ece": expected_calibration_error(*answers), "nll": negative_log_likelihood(*answers)}
    mistakes = evaluation.mistakes[:PICTURES]
    pictures = list(zip(thumbnails((row.item.path for row in mistakes), SIDE), mistakes, strict=True))
    text = templates(__package__).get_template("mistakes.html.jinja").render(content, pictures=pictures)
    write_file(path, text, "choose another --report")
