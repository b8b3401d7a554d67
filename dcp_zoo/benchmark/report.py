"""Reports on gathered results, one row per measured accuracy: tables, with differences between methods
that are paired by what they share."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dcp_zoo.benchmark import store
from dcp_zoo.data import DATASETS
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.files import write_file
from dcp_zoo.heads.config import NO_CLASSIFIER
from dcp_zoo.pages import templates
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.methods.table import DCP_METHOD

if TYPE_CHECKING:
    import pandas as pd

EMPTY = "-"
PUBLISHED = "published"  # in place of how a method's options were chosen: another project's figure


class Table(NamedTuple):
    """Rows of text; the first column names the row."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    best: dict[str, list[str]] = {}  # of a column, the rows with its best number: of equals all


def with_labels(results: "pd.DataFrame") -> "pd.DataFrame":
    """The results with a column `label`, such as "DCP (depth=3) + text probes, batch", in a fixed order and
    without duplicates: the method, its changed options, whether the head has text probes, and "batch" where
    a head with stored statistics was tested with those of the batch. If several folders have a result,
    the last one is used."""
    results = results.drop_duplicates(store.IDENTITY, keep="last").copy()
    results["options"] = results["options"].astype(object).fillna("")  # read as numbers if all are empty
    alone = results[results.stats == NO_CLASSIFIER]
    with_probe = {*zip(alone.method, alone.options, strict=True)}

    def label(method: str, options: str, stats: str) -> str:
        text = title(method)
        if options:
            text += f" ({options})"
        if (method, options) in with_probe and stats != NO_CLASSIFIER:
            text += " + text probes"
        if stats == "batch":
            text += ", batch"
        return text

    results["label"] = list(map(label, results.method, results.options, results.stats))
    results["rank"] = results.method.map(in_order(METHODS, results.method).index)
    return results.sort_values(["rank", "label", "shots", "seed"], kind="stable")


def published(results: "pd.DataFrame") -> "pd.DataFrame":
    """What others have published of the model of these results: in the same protocols, on the same datasets,
    numbers of images and test classes."""
    import pandas as pd

    figures = pd.read_csv(Path(__file__).with_name("published.csv"))
    same = ["protocol", "model", "weights", "dataset", "shots", "target", "classes"]
    tested = results.assign(weights=results.weights.str.partition("@")[0])[same].drop_duplicates()
    label = figures.method + ", published in " + figures.repository
    return figures.assign(label=label, selection=PUBLISHED).merge(tested, on=same)


def sources(results: "pd.DataFrame") -> list[Table]:
    """Where published figures are from."""
    header = ["label", "protocol", "commit", "file", "note"]
    rows = results.loc[results.selection == PUBLISHED, header].drop_duplicates().to_numpy().tolist()
    return [Table("Sources", header, rows, "This project measured none of them.")] if rows else []


def title(method: str) -> str:
    """The method's title as in papers; a method unknown to this version keeps its name."""
    return METHODS[method].title if method in METHODS else method


def in_order(known: Iterable[str], given: Iterable[str]) -> list[str]:
    """The given names, each once: those in a table of the project in its order, then unknown ones,
    sorted."""
    names = set(given)
    return [name for name in known if name in names] + sorted(names.difference(known))


def averaged(results: "pd.DataFrame", over: str = "dataset") -> "pd.DataFrame":
    """Means over all datasets for each label, part of the classes, shots and seed; NaN if a dataset is
    missing."""
    groups = results.groupby(["label", "classes", "shots", "seed"], sort=False).top1.agg(["mean", "count"])
    is_complete = groups["count"] == results[over].nunique()
    return groups["mean"].where(is_complete).rename("top1").reset_index()


def with_spread(values: "pd.Series") -> str:
    """Mean and, with more than one value, standard deviation."""
    values = values.dropna()
    if values.empty:
        return EMPTY
    mean = f"{values.mean():.1f}"
    return f"{mean} ± {values.std():.1f}" if len(values) > 1 else mean


def method_table(
    results: "pd.DataFrame", caption: str, column: str, columns: Sequence[object], note: str = ""
) -> Table:
    """One row per label, and one column for each of `columns`, values of `column`."""
    top1 = results.groupby(["label", column]).top1
    cells = top1.agg(with_spread).unstack()
    cells = cells.reindex(index=results.label.unique(), columns=columns).fillna(EMPTY)
    rows = cells.reset_index().to_numpy().tolist()
    means = top1.mean().round(1).unstack()
    best = {str(name): list(means.index[means[name] == means[name].max()]) for name in means}
    note = f"Mean ± standard deviation over seeds; without ±, of one seed or as published. {note}".strip()
    return Table(caption, ["method", *map(str, columns)], rows, note, best)


def few_shot_tables(results: "pd.DataFrame") -> list[Table]:
    """Methods by shots, with the images that their hyperparameters were chosen on; and their differences."""
    shots = sorted(results.shots.unique())
    selection = results.groupby("label").selection.unique()
    tables = []
    for caption, rows, note in by_dataset(results):
        table = method_table(rows, caption, "shots", shots, note)
        table.header.insert(1, "selection")
        for row in table.rows:
            row.insert(1, " / ".join(sorted(selection[row[0]])))
        tables.append(table)
    return tables + against(results)


def base_to_new_tables(results: "pd.DataFrame") -> list[Table]:
    """Methods by base and new classes, and the harmonic mean H of both."""
    import pandas as pd

    tables = []
    for caption, rows, note in by_dataset(with_shots(results)):
        note = f"H is the harmonic mean of the two means. {note}".strip()
        means = rows.groupby(["label", "classes"]).top1.mean().unstack().reindex(columns=["base", "new"])
        harmonic = (2 / (1 / means.base + 1 / means.new)).rename("top1").reset_index().assign(classes="H")
        both = pd.concat([rows, harmonic])
        tables.append(method_table(both, caption, "classes", ["base", "new", "H"], note))
    return tables


def by_dataset(results: "pd.DataFrame") -> Iterator[tuple[str, "pd.DataFrame", str]]:
    """Caption, results and note of each table: of the average, if there are several datasets, and of
    each."""
    names = in_order(DATASETS, results.dataset)
    if len(names) > 1:
        note = "A method without results for one of the datasets has no average."
        yield f"Average of {len(names)} datasets", averaged(results), note
    for name in names:
        yield name, results[results.dataset == name], ""


def target_tables(results: "pd.DataFrame") -> list[Table]:
    """One table per training dataset: methods by test datasets, and their average."""
    import pandas as pd

    results = with_shots(results)
    average = "average of targets"
    tables = []
    for source in in_order(DATASETS, results.dataset):
        rows = results[results.dataset == source]
        targets = rows[rows.target != source]
        both = pd.concat([rows, averaged(targets, "target").assign(target=average)])
        columns = [*in_order(DATASETS, rows.target), average]
        note = f"The average is over {targets.target.nunique()} targets, without {source} itself."
        tables.append(method_table(both, f"Trained on {source}", "target", columns, note))
    return tables


def with_shots(results: "pd.DataFrame") -> "pd.DataFrame":
    """Adds the number of shots to the label, for tables without a column for it."""
    shots = [f", {k}-shot" if k else "" for k in results.shots]
    return results.assign(label=results.label.str.cat(shots))


def interval(differences: "pd.Series") -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of paired differences, by Student's t; None for fewer
    than two."""
    from scipy.stats import t

    if len(differences) < 2:
        return None
    half = t.ppf(0.975, len(differences) - 1) * differences.sem()
    return float(differences.mean() - half), float(differences.mean() + half)


def differences(results: "pd.DataFrame", base: "pd.DataFrame") -> "pd.DataFrame":
    """Every pair of a result and one of `base` with the same dataset, shots, seed and test classes,
    with a column `difference`: top-1 minus that of the base, in percentage points. A method without
    training is paired with all shots and seeds. Column `sample` is the dataset, or of a single dataset
    the seed: shots and seeds of a dataset share its classes and test images, and are no samples of
    other datasets."""
    same = ["dataset", "target", "classes"]
    if min(results.shots.max(), base.shots.max()) > 0:  # both are trained
        same += ["shots", "seed"]
    pairs = results.merge(base, on=same, suffixes=("", "_base"))
    seeds = pairs.filter(["seed", "seed_base"]).max(axis=1)  # without training it is 0
    sample = pairs.dataset if pairs.dataset.nunique() > 1 else seeds
    return pairs.assign(difference=pairs.top1 - pairs.top1_base, sample=sample)


def by_sample(pairs: "pd.DataFrame") -> "pd.Series":
    return pairs.groupby("sample", sort=False).difference.mean()


def difference_cell(values: "pd.Series") -> str:
    """Mean difference and its interval, marked if the interval excludes 0."""
    if values.empty:
        return EMPTY
    mean = f"{values.mean():+.1f}"
    limits = interval(values)
    if limits is None:
        return mean
    low, high = limits
    mark = " *" if low > 0 or high < 0 else ""
    return f"{mean} ({low:+.1f} to {high:+.1f}){mark}"


def paired(results: "pd.DataFrame") -> tuple[str, "pd.DataFrame"]:
    """The label of the reference, and `differences` of every trained method from it. The reference is DCP's own
    logits with stored statistics; of several DCPs that with the shortest label, which has no option beyond
    those of all."""
    trained = results[(results.selection != PUBLISHED) & (results.shots > 0)]
    reference = min(trained.label[trained.method == DCP_METHOD], key=len, default="")
    is_reference = trained.label == reference
    return reference, differences(trained[~is_reference], trained[is_reference])


def against(results: "pd.DataFrame") -> list[Table]:
    """Every trained method minus the reference, see `paired`, by shots and over all of them."""
    reference, pairs = paired(results)
    if pairs.empty:
        return []
    shots = sorted(pairs.shots.unique())
    rows = []
    for label, group in pairs.groupby("label", sort=False):
        by_shots = [difference_cell(by_sample(group[group.shots == k])) for k in shots]
        rows.append([label, str(len(group)), *by_shots, difference_cell(by_sample(group))])
    note = (
        f"Top-1 minus that of {reference}, in percentage points: mean over pairs with the same dataset, shots and "
        "seed, with its 95 % interval over datasets, or seeds of a single one (Student's t). * the interval excludes 0."
    )
    header = ["method", "pairs", *[f"{k}-shot" for k in shots], "all"]
    return [Table(f"Differences from {reference}", header, rows, note)]


SECTIONS: dict[str, tuple[str, Callable[["pd.DataFrame"], list[Table]]]] = {  # heading and tables of a protocol
    "few-shot": ("Few-shot classification", few_shot_tables),
    "base-to-new": ("Base-to-new generalisation", base_to_new_tables),
    "cross-dataset": ("Cross-dataset transfer", target_tables),
    "domain-shift": ("Domain shift", target_tables),
}


def tables_of(results: "pd.DataFrame", protocol: str) -> list[Table]:
    """The tables of one of the protocols that the results are of."""
    _, make = SECTIONS[protocol]
    return make(results[results.protocol == protocol])


def tex(text: object) -> str:
    """Text for LaTeX."""
    return re.sub(r"([&%$#_{}])", r"\\\1", str(text)).replace("±", r"$\pm$")


def write_report(folders: Sequence[Path], path: Path) -> list[Path]:
    """Write a Markdown page on the results in the output folders of sweeps, beside it the same tables in
    LaTeX and, where matplotlib is installed, figures. The files that were written."""
    import pandas as pd

    results = store.gather(folders)
    if results.empty:
        raise ZooError(f"No result in {', '.join(map(str, folders))}: pass the --output folder of `dcp-zoo benchmark`.")
    failed: dict[str, str] = {}
    for folder in folders:
        failed |= store.failures(folder)
    sections: list[Values] = []
    files = [path, path.with_suffix(".tex")]
    for (model, weights), rows in with_labels(results).groupby(["model", "weights"]):
        both = pd.concat([rows, published(rows)])
        tables = {heading: tables_of(both, protocol) for protocol, (heading, _) in SECTIONS.items()}
        tables["Published figures"] = sources(both)
        figures = {f"{kind}{len(sections) + 1}": figure for kind, figure in figures_of(rows).items()}
        for name, figure in figures.items():
            for suffix in ("png", "pdf"):
                file = path.with_name(f"{name}.{suffix}")
                write_file(file, partial(figure.savefig, dpi=150, format=suffix))
                files.append(file)
        sections.append({"model": model, "weights": weights, "tables": tables, "figures": list(figures)})
    pages = templates(__package__)
    pages.filters["tex"] = tex
    content = {"folders": folders, "accuracies": len(results), "failed": failed, "sections": sections}
    for file in files[:2]:
        write_file(file, pages.get_template(f"report{file.suffix}.jinja").render(content))
    return files


def figures_of(results: "pd.DataFrame") -> Values:
    """The figures that the results of one model allow, by name; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return {}
    from dcp_zoo.benchmark import figures

    made: Values = {}
    results = results[results.protocol == "few-shot"]
    panels = {caption: rows for caption, rows, _ in by_dataset(results)}
    if panels:
        made["accuracy"] = figures.accuracy_figure(panels)
    reference, pairs = paired(results)
    gaps = {}
    for label, group in pairs.groupby("label", sort=False):
        values = by_sample(group)
        gaps[label] = (values.mean(), interval(values))
    if gaps:
        made["differences"] = figures.differences_figure(gaps, reference)
    return made
