"""Keeps the measured numbers of README and docs equal to the results.

    python benchmarks/quote.py    rewrites them from benchmarks/results and the registry; lists what has none

`quotes.yaml` lists for each page the sentences and cells with values, {{EXPRESSION}} in place of each, of
the functions below. The digits after the point stay as many as they are. "Better than", "worse than" and
"not significantly different from" are values, too: they say whether the confidence interval of a paired
difference over datasets (of one dataset: over seeds) excludes 0. A number that is no measurement of this
project has its source in its place, {{from arXiv 2305.17903}}, or is in `FACTS`. "table: EXPRESSION" lists a
table or a list of names, found by its first line; "page: EXPRESSION" a whole page; "needs X: LINE" a code
block with this line that tests do not run.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from doc_tables import (  # noqa: F401 - for the pages' expressions
    as_table,
    commands,
    every_clip,
    heads_table,
    leaderboard,
    like_accepted,
    methods_table,
    models_table,
    names,
    predictor_rate,
    real_clip_summary,
    speed,
    speed_table,
    train_times,
)
from reads import METHOD, READINGS
from sets import REPORTING

from dcp_zoo.benchmark import report
from dcp_zoo.heads.config import COUPLINGS
from dcp_zoo.training.methods import METHODS  # noqa: F401 - for the pages' expressions
from dcp_zoo.zoo.specs import MODELS

ROOT = Path(__file__).parents[1]
QUOTES = ROOT / "benchmarks" / "quotes.yaml"
RESULTS = ROOT / "benchmarks" / "results"
MINIATURE = ROOT / "hub" / "recipes" / "miniature" / "README.md"
PAGES = [ROOT / "README.md", MINIATURE, ROOT / "hub" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMPARING = ("README.md", "results.md")  # pages on which every comparison needs a mark

NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
# how entries begin that are no sentences
TABLE = "table: "
PAGE = "page: "
NEEDS = re.compile(r"needs [^:]*: ")
FROM = "from "  # how a number's source begins
QUOTED = "\0"  # stands in place of an accuracy
VERDICTS = BETTER, LEVEL, WORSE = ("better than", "not significantly different from", "worse than")
VALUE = rf"({'|'.join(VERDICTS)}|{NUMBER})".replace(" ", r"\s+")
HOLE = re.compile(r"\{\{(.*?)\}\}")  # of a listed sentence
UNIT = r"(?:%|(?:points?|ms|s|seconds?|minutes?|h|hours?|[kMG]B|times|G?FLOPs?|x(?! ?\d))\b)"
MEASURED = re.compile(rf"(?<![\w.,/-]){NUMBER}[\s-]?{UNIT}|(?<![\w.,-])\d\d\.\d\b(?![.\d])")
COMPARISON = re.compile(
    r"\b(?:above|below|ahead|behind|level|on par|better|worse|beats?|outperforms?|trails?|(?:more|less) accurate)\b"
)
NOT_PROSE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)

FACTS = {  # no measurements, allowed on every page
    "97.5 %": "confidence of what an accuracy is at least",
    "90 %": "confidence of what can be trusted, and the share of images whose class is in a set",
    "95 %": "level of all intervals, and share of training images that pass the threshold for rejection",
    "5 %": "share of its own images that `--reject` refuses",
    "30 %": "test share of `train`",
    "0.05 points": "tolerance of `eval --claim` and `submit`",
    "2 points": "gate of `build`",
    "1 point": "gate of `build`",
    "20 MB": "limit of server and demo",
    "30 seconds": "limit of the server",
    "60 seconds": "interval of the training state",
    "20 seconds": "interval of parts of `predict`",
    "20 times": "validations during training",
    "4 times": "width of CMPA's MLP",
}
ALLOWED = re.compile(rf"(?<![\d.,])(?:{'|'.join(FACTS)})(?!\w)")

# ------------------------------------------------------------------------------------------ what expressions can select


@cache
def results(file: str) -> pd.DataFrame:
    """A file of benchmarks/results; one of accuracies has the report's labels, such as "DCP" and "DCP,
    batch"."""
    rows = pd.read_csv(RESULTS / f"{file}.csv")
    return report.with_labels(rows) if {"protocol", "stats"} <= {*rows} else rows


def select(file: str, **where: Any) -> pd.DataFrame:
    """The rows whose columns have these values; None is any value."""
    rows = results(file)
    for column, value in where.items():
        if value is not None:
            rows = rows[rows[column] == value]
    if rows.empty:
        raise LookupError(f"no row of {file}.csv has {where}")
    return rows


def value(file: str, column: str, agg: str = "mean", **where: Any) -> float:
    """The mean, or another aggregate, of a column."""
    return float(select(file, **where)[column].agg(agg))


def top1(label: str, shots: int | None = None, file: str = "few-shot", **where: Any) -> float:
    """Mean accuracy over seeds, and over shots if none are given."""
    return value(file, "top1", label=label, shots=shots, **where)


def differences(label: str, reference: str, shots: int | None = None, file: str = "few-shot", **where: Any) -> Any:
    """Top-1 of a label minus that of the reference, paired by test set, shots and seed: the mean of each
    dataset, or of each seed if there is one dataset. A method without training is paired with all of
    them."""
    trained = {x: select(file, label=x).shots.max() > 0 for x in (label, reference)}
    first, second = (select(file, label=x, shots=shots if trained[x] else 0, **where) for x in trained)
    return report.by_sample(report.differences(first, second))


def versus(*args: Any, **kwargs: Any) -> str:
    """Whether a label is better or worse than the reference, as far as the interval tells."""
    return verdict(differences(*args, **kwargs))


def verdict(gaps: pd.Series) -> str:
    """What the interval of paired differences tells."""
    low, high = report.interval(gaps) or (0, 0)
    if low > 0:
        return BETTER
    return WORSE if high < 0 else LEVEL


def titled(method: str) -> str:
    """The title of a method, with its recipe if it has one."""
    name, comma, recipe = method.partition(",")
    return report.title(name) + comma + recipe


NUMBERS = (4, 16)  # images per class with which every method that trains prompts or weights is measured
READ_BY = {"top1": "top-1", "ece": "ECE", "auroc_near": "AUROC, near"}
PARTS = {"": "", "x": "", "stem": " on the stem", "x+stem": " on both", "x,stem": " on both", "x,stem,stage": ""}


@cache
def on_sets(file: str = "many_sets") -> pd.DataFrame:
    """Top-1, ECE and CPU seconds on the reporting sets of `sets.py`, a column of each for every method and
    way of reading it; a row for every set, number of images per class and seed. Draws that were measured in
    part are left out. Of two files, as in "many_sets+baselines", the first counts for what is in both."""
    probes = results("reads").replace({"reading": READINGS}).assign(method=METHOD)  # that "baselines" lacks
    tables = []
    for each in file.split("+"):
        tables.append(results(each))
        if each == "baselines":
            tables.append(probes)
    rows = pd.concat(tables, ignore_index=True)
    rows["reading"] = rows.reading.fillna("") if "reading" in rows else ""
    rows = rows[rows.set.isin(REPORTING)]
    rows["label"] = rows.method.map(titled) + rows.reading.map(PARTS)
    rows.loc[(rows.method == "text-probe") & (rows.reading == "x"), "label"] += " on the embedding"
    keys = ["set", "images_per_class", "seed"]
    rows = rows.drop_duplicates([*keys, "label"])
    table = rows.pivot_table(["top1", "ece", "train_cpu_seconds"], keys, "label", sort=False)
    measured = table.notna().groupby("seed").transform("sum")
    return table.where(measured == measured.max())


def set_gaps(label: str, reference: str, images: int | None = None, file: str = "many_sets") -> Any:
    """Top-1 minus the reference's, paired by set, images per class and seed: the mean of each set, since
    only sets are samples of what a reader will use a method on, not their draws and numbers of images."""
    found = on_sets(file)["top1"]
    gaps = (found[label] - found[reference]).dropna()
    if images is not None:
        gaps = gaps.xs(images, level="images_per_class")
    return gaps.groupby("set", sort=False).mean()


def set_gap(*args: Any, **kwargs: Any) -> float:
    """The mean of `set_gaps`."""
    return float(set_gaps(*args, **kwargs).mean())


def set_versus(*args: Any, **kwargs: Any) -> str:
    """Whether a method is better or worse than the reference on the sets, as far as the interval tells."""
    return verdict(set_gaps(*args, **kwargs))


def set_mean(label: str, images: int | None = None, what: str = "top1", file: str = "many_sets") -> float:
    """The mean over the sets."""
    found = on_sets(file)[what][label]
    if images is not None:
        found = found.xs(images, level="images_per_class")
    return float(found.mean())


def set_count(file: str = "many_sets") -> int:
    """How many reporting sets the averages are over."""
    return on_sets(file).index.get_level_values("set").nunique()


def cells_of(label: str, numbers: Sequence[int], file: str) -> list[str]:
    """Mean top-1 over the sets, by images per class."""
    return [f"{set_mean(label, images, file=file):.1f}" for images in numbers]


def many_sets(*labels: str, file: str = "baselines+many_sets") -> str:
    """Averages of these methods over the reporting sets: top-1 by images per class, the mean paired
    difference from zero-shot CLIP with its interval over sets, and CPU seconds of training at 4 images per
    class."""
    numbers = sorted({images for _, images, _ in on_sets(file).index})
    lines = []
    for label in labels:
        gaps = "" if label == "Zero-shot" else report.difference_cell(set_gaps(label, "Zero-shot", file=file))
        seconds = f"{set_mean(label, 4, 'train_cpu_seconds', file):.0f}"
        lines.append([label, *cells_of(label, numbers, file), gaps, seconds])
    return as_table(["top-1, %, by images per class", *map(str, numbers), "minus zero-shot", "CPU seconds"], lines)


def few_gaps(label: str, reference: str, file: str = "many_sets+baselines") -> Any:
    """As `set_gaps`, with the numbers of images that all methods are measured with."""
    found = on_sets(file)["top1"]
    gaps = (found[label] - found[reference])[found.index.isin(NUMBERS, level="images_per_class")].dropna()
    return gaps.groupby("set", sort=False).mean()


def prompts_table(*labels: str, file: str = "many_sets+baselines") -> str:
    """Methods that train prompts or weights, on the reporting sets: alone and minus zero-shot CLIP; CPU
    seconds of training at 4 images per class, and draws."""
    lines = []
    for label in labels:
        cells = [*cells_of(label, NUMBERS, file), report.difference_cell(few_gaps(label, "Zero-shot", file))]
        draws = on_sets(file)["top1"][label].dropna().index.get_level_values("seed").nunique()
        lines.append([label, *cells, f"{set_mean(label, 4, 'train_cpu_seconds', file):.0f}", draws])
    return as_table(["method", *(f"{n} images" for n in NUMBERS), "minus zero-shot", "CPU seconds", "draws"], lines)


def recipes(images: int = 4) -> str:
    """DCP's own logits by recipe, on the draws that all have, and minus this project's recipe for the
    miniature."""
    labels = {"this project's": "DCP", "`paper`": "DCP, paper", "`release`": "DCP, release"}
    found = on_sets()["top1"].xs(images, level="images_per_class")[[*labels.values()]].dropna()
    means = found.groupby("set", sort=False).mean()
    lines = []
    for recipe, label in labels.items():
        gaps = report.difference_cell(means[label] - means["DCP"]) if label != "DCP" else ""
        lines.append([recipe, *map("{:.1f}".format, [*means[label], means[label].mean()]), gaps])
    return as_table(["recipe", *means.index, "mean", "difference"], lines)


def features_table(*methods: str, file: str = "baselines") -> str:
    """Methods on features, on the reporting sets: each on the embedding alone and on both vectors, minus the
    text probe that reads the same."""
    numbers = (1, 4, 16)
    lines = []
    for method in methods:
        alone = f"{method} on the embedding" if method == "Text probe" else method
        line = [method]
        for label, reference in ((alone, "Text probe on the embedding"), (f"{method} on both", "Text probe on both")):
            gaps = "" if method == "Text probe" else report.difference_cell(set_gaps(label, reference, file=file))
            line += [*cells_of(label, numbers, file), gaps]
        lines.append(line)
    header = ["method", *(f"embedding, {n}" for n in numbers), "minus the text probe on it"]
    return as_table([*header, *(f"both, {n}" for n in numbers), "minus the text probe"], lines)


def reads(what: str = "top1") -> pd.DataFrame:
    """The text probe on the embedding alone and on more: means of each reporting set, by images."""
    rows = results("reads")
    rows = rows[rows.set.isin(REPORTING)]
    return rows.pivot_table(what, ["set", "images_per_class"], "reading", sort=False)


def reads_table() -> str:
    """What each reading adds to the one before, on each reporting set and over all with its interval, by
    images; empty where it was not measured."""
    found = reads()
    lines = []
    numbers = sorted({images for _, images in found.index})
    for less, more in pairwise(found.columns):
        name = re.split(", | and ", more)[-1]
        steps = (found[more] - found[less]).unstack()
        lines += [[each, name, *map("{:+.1f}".format, row)] for each, row in steps[numbers].iterrows()]
        for what, title in READ_BY.items():
            gaps = (reads(what)[more] - reads(what)[less]).unstack().reindex(columns=numbers)
            cells = [report.difference_cell(gap.dropna()) if gap.any() else "" for _, gap in gaps.items()]
            lines.append([f"**all, {title}**", name, *cells])
    return as_table(["dataset", "adds", *map(str, numbers)], lines).replace("+nan", "")


def reads_gain(images: int, what: str = "top1") -> float:
    """What all that is read adds to the embedding: the mean difference over the reporting sets."""
    found = reads(what).xs(images, level="images_per_class").ffill(axis=1)
    return float((found[found.columns[-1]] - found["embedding"]).mean())


def explained() -> str:
    """How much a logit falls if what an explanation names is hidden, and if it is elsewhere."""
    rows = results("explain")
    cells = [
        (row.set, f"{row.fall_named:.2f}", f"{row.fall_elsewhere:.2f}", f"{row.named_falls_more:.0f}")
        for row in rows.itertuples()
    ]
    return as_table(["dataset", "hidden where it points", "elsewhere", "images on which the first is more, %"], cells)


def reading_costs() -> str:
    """CPU time of one image by fused heads, relative to that of CLIP's `encode_image`."""
    rows = select("readings", batch=1)
    rows = rows[~rows["head"].str.startswith("DCP")]
    lines = [[f"`{model}`", *(f"{x:.2f}" for x in of.ratio)] for model, of in rows.groupby("model", sort=False)]
    return as_table(["model", *rows["head"].unique()], lines).replace("encode_image", "`encode_image`")


def parity() -> str:
    """The runs of `parity.py` side by side."""
    rows = results("parity").sort_values(["precision", "method", "seed"], ascending=[False, True, True], kind="stable")
    runs = rows.assign(run=rows.method.map(report.title) + ", seed " + rows.seed.astype(str) + ", " + rows.precision)
    shown = runs.pivot_table("value", "what", "run", aggfunc="first", sort=False).fillna("")
    return as_table(["", *shown.columns], [[what, *row] for what, row in zip(shown.index, shown.values, strict=True)])


def labels_of(rows: pd.DataFrame) -> pd.Series:
    """What tables call a method, with its recipe, if it has another than the default, and how its head is
    read."""
    titles = rows.method.map(titled)
    probe = titles == report.title("text-probe")
    reading = rows.reading.where(~probe, rows.reading.str.removeprefix("text probes")).replace("", pd.NA)
    return titles + (reading.where(probe, " + " + reading)).fillna("")


def transferred(protocol: str, images: int) -> pd.DataFrame:
    """Rows of `transfer.csv`, with how tables call a method, whether it is tested at home, and the column of
    a test."""
    rows = results("transfer").fillna({"reading": ""}).query("protocol == @protocol and images_per_class == @images")
    rows = rows.assign(label=labels_of(rows), home=(rows.target == rows.trained_on) | (rows.target == "base"))
    if protocol == "domain-shift":
        rows["column"] = rows.trained_on.where(~rows.home, "at home")
    else:
        rows["column"] = rows.target if protocol == "cross-dataset" else rows.trained_on + ", " + rows.target
    return rows


def transfer_gaps(label: str, protocol: str = "domain-shift", images: int = 16) -> "pd.Series[float]":
    """Top-1 away from home minus that of zero-shot CLIP: means over draws, for each column of the table."""
    rows = transferred(protocol, images).query("not home")
    found = rows.pivot_table("top1", ["label", "column"], "seed", sort=False)
    own = found.loc[label].dropna(axis=1)
    return (own - found.loc["Zero-shot"][own.columns]).mean(axis=1)


def probes_gaps() -> "pd.Series[float]":
    """Top-1 of DCP with text probes minus that of the text probe alone, for each style of PACS that both
    were trained and tested on with 16 images per class: means over draws."""
    rows = transferred("domain-shift", 16).query("home")
    found = rows.pivot_table("top1", "trained_on", "label")
    return found["DCP + text probes"] - found["Text probe"]


def transfer(protocol: str, images: int = 16, *labels: str) -> str:
    """Top-1 of other styles, new classes or other sets: means over draws, and the difference from zero-shot
    CLIP with its interval over what was trained on, or for one set over the tests. What is tested "at home"
    counts in no difference."""
    rows = transferred(protocol, images)
    found = rows.pivot_table("top1", ["label", "column"], "seed", sort=False)
    lines = []
    columns = list(dict.fromkeys(rows.column))
    away = list(dict.fromkeys(rows[~rows.home].column))
    for label in labels or rows.label.unique():
        own = found.reindex([label], level=0).droplevel(0).dropna(axis=1)
        if len(own) < len(columns):  # it is not measured everywhere yet
            continue
        means = own.mean(axis=1)
        gaps = transfer_gaps(label, protocol, images)
        cells = [f"{means[c]:.1f}" for c in columns] + [f"{means[away].mean():.1f}"]
        lines.append([label, *cells, report.difference_cell(gaps) if gaps.any() else "", own.shape[1]])
    return as_table(["method", *columns, "mean, not at home", "minus zero-shot", "draws"], lines)


def gate_gains(images: int, home: bool = False) -> "pd.Series[float]":
    """What the gate adds to the text probe on other styles, or at home, in points: means for each style of
    training."""
    rows = select("transfer", protocol="domain-shift", method="text-probe", images_per_class=images)
    means = rows[(rows.target == rows.trained_on) == home].pivot_table("top1", "trained_on", "reading")
    return means["text probes"] - means["text probes, without gate"]


def parts() -> str:
    """The paper's recipe with one change at a time: top-1 on each set, over the draws that all have, and the
    difference of the change, with its interval over sets."""
    rows = results("parts").fillna({"changes": ""})
    found = rows[rows.stats == "stored"].pivot_table("top1", ["set", "seed"], "changes", sort=False)
    lines = []
    for change in found:
        pairs = found[["", change]].dropna() if change else found[[""]]
        means = pairs.groupby("set", sort=False).mean()
        gaps = "" if not change else report.difference_cell(means[change] - means[""])
        draws = pairs.groupby("set").size().min()
        lines.append([f"`{change}`" if change else "recipe `paper`", *(f"{x:.1f}" for x in means[change]), gaps, draws])
    return as_table(["change", *found.index.unique("set"), "difference", "draws"], lines)


UNCOUPLED = ("zero-shot", "coop", "kgcoop", "prograd", "cocoop", "vpt-deep", "ivlp")  # in the order of their tables
PAPERS_COUPLING = ("dcp", "coupling=bidirectional")


@cache
def coupled(images: int) -> pd.DataFrame:
    """Top-1 by set and draw, a column for each method and its changes, of `paper.py coupling`; draws that
    were measured on some of the sets alone are left out."""
    rows = select("coupling", images_per_class=images).fillna({"changes": ""})
    found = rows.pivot_table("top1", ["seed", "set"], ["method", "changes"], sort=False)
    is_complete = found.notna().groupby("seed").transform("sum") == len(REPORTING)
    return found.where(is_complete).dropna(axis=1, how="all")


def coupling_gaps(method: str, changes: str, images: int, base: tuple[str, str] = PAPERS_COUPLING) -> pd.Series:
    """Top-1 minus the base's, by default the paper's coupling, paired by draw: the mean of each set."""
    found = coupled(images)
    gaps = (found[method, changes] - found[base]).dropna()
    return gaps.groupby("set", sort=False).mean()


def coupling_versus(*args: Any, **kwargs: Any) -> str:
    return verdict(coupling_gaps(*args, **kwargs))


def with_changes(method: str, changes: str) -> str:
    return f"{titled(method)}, `{changes}`" if changes else titled(method)


def in_tables_order(found: pd.DataFrame) -> list[tuple[str, str]]:
    """Methods with their changes: DCP's couplings, then methods whose prompts are not coupled."""
    columns = [("dcp", f"coupling={name}") for name in COUPLINGS]
    columns += [column for method in UNCOUPLED for column in found.columns if column[0] == method]
    return [column for column in columns if column in found.columns]


def coupling(images: int) -> str:
    """What CMPA is worth: methods with and without coupled prompts, over the draws that are complete."""
    found = coupled(images)
    rows = select("coupling", images_per_class=images).fillna({"changes": ""})
    lines = []
    for column in in_tables_order(found):
        method, changes = column
        own = found[column].dropna()
        means = own.groupby("set", sort=False).mean()
        seeds = own.index.unique("seed")
        costs = rows[(rows.method == method) & (rows.changes == changes) & rows.seed.isin(seeds)]
        lines.append(
            [
                with_changes(method, changes),
                *(f"{means[name]:.1f}" for name in REPORTING),
                f"{means.mean():.1f}",
                "" if column == PAPERS_COUPLING else report.difference_cell(coupling_gaps(*column, images)),
                f"{costs.trained_parameters.mean():,.0f}",
                f"{costs.cpu_seconds.mean():.0f}",
                len(seeds),
            ]
        )
    return as_table(
        [f"prompts, {images} images", *REPORTING, "mean", "difference", "trained parameters", "CPU s", "draws"], lines
    )


@cache
def elsewhere() -> pd.DataFrame:
    """Top-1 of `paper.py coupling-elsewhere`, means over targets: a column for each method and its changes, a
    row for what is tested, what was trained on, and the draw."""
    rows = results("coupling_elsewhere").fillna({"changes": ""})
    styles = (rows.target == rows.trained_on).map({True: "the style of training", False: "other styles"})
    rows["tested"] = styles.where(rows.protocol == "domain-shift", rows.trained_on + ", " + rows.target + " classes")
    return rows.pivot_table("top1", ["tested", "trained_on", "seed"], ["method", "changes"], sort=False)


def elsewhere_gaps(method: str, changes: str) -> "pd.Series[float]":
    """Top-1 on other styles minus that of the paper's coupling, paired by draw: the mean of each style of
    training."""
    found = elsewhere().loc["other styles"]
    return (found[method, changes] - found[PAPERS_COUPLING]).dropna().groupby("trained_on", sort=False).mean()


def coupling_elsewhere() -> str:
    """What CMPA is worth in other styles than those of training, and on new classes."""
    found = elsewhere()
    columns = list(found.index.unique("tested"))
    lines = []
    for method, changes in in_tables_order(found):
        means = found[method, changes].groupby("tested", sort=False).mean()
        gaps = elsewhere_gaps(method, changes)
        lines.append(
            [
                with_changes(method, changes),
                *(f"{means[name]:.1f}" for name in columns),
                "" if (method, changes) == PAPERS_COUPLING else report.difference_cell(gaps),
                found[method, changes].groupby(["tested", "trained_on"]).count().min(),
            ]
        )
    return as_table(["prompts, 16 images", *columns, "difference on other styles", "draws"], lines)


def rejection() -> str:
    """How well the heads' score tells known images from others: means over sets and seeds, the worst set of
    the far ones, and what the heads' threshold rejects and accepts."""
    columns = ["known_refused", "near_passed", "far_passed", "far_passed_estimate"]
    lines = []
    for file, features in (("rejection", "the miniature"), ("rejection_clip", "ViT-B/32")):
        rows = select(file, score="entropy and distance")
        for images, own in rows.groupby("images_per_class"):
            worst = own.groupby("set").auroc_far.mean().min()
            means = [own.auroc_near.mean(), own.auroc_far.mean(), worst, *(own[c].mean() for c in columns if c in own)]
            cells = ["" if x != x else f"{x:.1f}" for x in means]
            lines.append([features, images, *cells, *[""] * (3 + len(columns) - len(cells))])
    header = ["features of", "images per class", "AUROC, near", "AUROC, far", "worst dataset, far"]
    header += ["known rejected", "near accepted", "far accepted", "everyday pictures accepted"]
    return as_table(header, lines)


def rejection_gaps(images: int = 1) -> pd.Series:
    """The share of similar classes that a head's test let pass minus the estimated one, in percentage
    points, of heads with so many images per class or more."""
    heads = results("rejection").query("images_per_class >= @images")
    return (heads.near_passed - heads.near_passed_estimate).dropna()


def rejection_examples() -> str:
    """What heads reject and accept that were given so many examples of none of the classes: means over
    sets."""
    rows = results("rejection_examples")
    columns = ["alike_passed", "known_refused", "far_passed"]
    sets = rows.groupby(["part", "examples", "set"], sort=False)[columns].mean()
    lines = []
    for (part, examples), means in sets.groupby(["part", "examples"], sort=False):
        which = "ViT-B/32" if part == "choosing" else "the miniature"
        lines.append([f"{len(means)}, {which}", str(examples), *map("{:.1f}".format, means.mean())])
    header = ["datasets, features of", "examples", "similar things accepted", "known rejected"]
    return as_table([*header, "other datasets accepted"], lines)


def bursts(part: Any = REPORTING) -> str:
    """What heads refuse and tell of images in bursts: means over the draws of each set, then over sets."""
    rows = results("bursts").query("set in @part").pivot_table("value", ["images", "set", "draw"], "name", sort=False)
    rows["in interval"] *= 100
    rows["width"] = (rows["interval high"] - rows["interval low"]) / rows["interval of three tenths"]
    columns = ["refused without groups", "refused", "top1", "top1 told", "in interval"]
    means = rows.groupby(["images", "set"], sort=False).mean().groupby("images", sort=False).mean()
    lines = [
        [pattern, *(f"{row[name]:.1f}" for name in columns), f"{row['width']:.2f}"] for pattern, row in means.iterrows()
    ]
    header = ["images of a class", "rejected without groups", "rejected", "top-1", "top-1 told", "in its interval, %"]
    return as_table([*header, "width of the interval"], lines)


def told() -> str:
    """The accuracy that is reported by folds beside that on other images: of all sets, and without
    groceries."""
    rows = results("told").rename(columns={"images_per_class": "images"})
    rows["difference"] = rows["told"] - rows["top1"]
    rows["worse"] = 100 * (rows["top1"] < rows["low"])
    rows["better"] = 100 * (rows["top1"] > rows["high"])
    without = rows[rows["set"] != "groceries"].groupby("images")["worse"].mean()
    lines = [
        [f"{images}", *(f"{row[name]:.1f}" for name in ("difference", "worse", "better")), f"{without[images]:.1f}"]
        for images, row in rows.groupby("images")[["difference", "worse", "better"]].mean().iterrows()
    ]
    header = ["images of a class", "reported minus true", "worse than the interval, %", "better, %"]
    return as_table([*header, "worse, without groceries, %"], lines)


def worth() -> str:
    """What is promised of images like those of training beside what others say: means over the draws of each
    set, then over sets; how often trust is broken also without groceries."""
    rows = results("worth")
    rows["told"] = 100 * rows["trusted_5"].notna()
    rows["kind"] = rows["of_a_burst"].map({1: "", 4: ", in bursts of 4"})
    rows["kind"] = rows["kind"].where(rows["weights"] != "dcp_vitb32", ", features of ViT-B/32")
    cells = ["kind", "images_per_class"]
    columns = ["coverage_80", "coverage_90", "coverage_95", "size_90", "worst_90", "told", "trusted_5", "wrong_5"]
    means = rows.groupby([*cells, "set"])[columns].mean().groupby(cells).mean()
    lines = []
    for (kind, images), row in means.iterrows():
        heads = rows[(rows[cells] == [kind, images]).all(axis=1) & rows["trusted_5"].notna()]
        wrong = [part["wrong_5"] > 5 for part in (heads, heads[heads["set"] != "groceries"])]
        broken = [f"{each.sum()} of {len(each)}" if len(each) else "" for each in wrong]
        lines.append([f"{images}{kind}", *("" if pd.isna(cell) else f"{cell:.1f}" for cell in row), *broken])
    header = ["images of a class", "in a set where 80 % are asked", "90 %", "95 %", "classes in a set for 90 %"]
    header += ["in a set for 90 %, worst class", "heads that can tell", "images trusted", "wrong of these"]
    return as_table([*header, "heads with more than 5 % wrong", "the same without groceries"], lines)


def spot_check() -> str:
    """What the labels of a few images say of a head on other images of its set, and of another: means over
    heads of each kind, over sets."""
    rows = results("spot_check")
    rows["asked about"] = (rows["set"] == rows["asked_about"]).map({True: "the same source", False: "another style"})
    columns = ["coverage", "width", "random_width", "saved"]
    of_sets = rows.groupby(["asked about", "labels", "set", "asked_about"])[columns]
    means = of_sets.mean().groupby(["asked about", "labels"]).mean().sort_index(ascending=[False, True])
    least = rows.groupby(["asked about", "labels"])["coverage"].min()
    lines = [
        [images, f"{labels}", f"{row['coverage']:.1f}", f"{least[images, labels]:.1f}"]
        + [f"{row[name] / 2:.1f}" for name in ("width", "random_width")]
        + [f"{row['saved']:.2f}"]
        for (images, labels), row in means.iterrows()
    ]
    header = ["the folder is of", "labels", "interval holds, %", "of the worst head", "half its width, points"]
    return as_table([*header, "of random labels", "random labels for one"], lines)


def which_head() -> str:
    """Which of two heads is better: means over draws, then over sets."""
    rows = results("which_head")
    rows["gap"] = rows["difference"].abs()
    columns = ["gap", "better", "worse", "false_alarms", "enough"]
    cells = ["heads", "of_a_burst", "labelled"]
    means = rows.groupby([*cells, "set"])[columns].mean().groupby(cells).mean()
    lines = []
    for (heads, of_a_burst, labelled), row in means.iterrows():
        label = f"{labelled}" if of_a_burst == 1 else f"{labelled} bursts of {of_a_burst}"
        lines.append([f"{heads} per class", label, *(f"{row[name]:.1f}" for name in columns)])
    header = ["heads of", "labelled images", "difference, points", "the better one is named, %", "the worse one"]
    return as_table([*header, "one of two as good", "one, with as many more images as told"], lines)


def sizes() -> str:
    """Balanced accuracy, and recall of a class of two images, beside larger ones with and without the bias, and
    against as few: means over draws, and over the sets."""
    rows = results("sizes").query("set in @REPORTING")
    cells = [(others, bias) for others in ("classes of 40", "one class of 40") for bias in ("without", "with")]
    cells.append(("one class of 2", "with"))
    means = rows.groupby(["set", "others", "bias"], sort=False)[["balanced", "recall"]].mean()
    overall = means.groupby(["others", "bias"]).mean()
    lines = []
    for name in [*rows["set"].unique(), "**mean**"]:
        found = [overall.loc[cell] if name == "**mean**" else means.loc[(name, *cell)] for cell in cells]
        lines.append([name, *(f"{row['balanced']:.1f} / {row['recall']:.0f}" for row in found)])
    header = ["dataset", "beside classes of 40, without", "with", 'against one "other" of 40, without', "with"]
    return as_table([*header, 'against an "other" of 2'], lines)


def subjects() -> str:
    """What is told where subjects are few, with the sign and without it: means over draws, sets and numbers of
    subjects; and how often single photographs show it."""
    rows = results("subjects")
    single = rows[rows["photographs"] == 1]
    few = rows[rows["photographs"] > 1].copy()
    few["before"] = few["top1"].between(few["told_low"], few["told_high"])
    few["now"] = few["top1"].between(few["low"], few["high"])
    for name in ("shown", "before", "now"):
        few[name] = 100 * few[name]
    columns = ["shown", "top1", "told", "before", "now", "refused_without", "refused"]
    means = few.groupby("way", sort=False)[columns].mean()
    means.loc["all"] = few[columns].mean()
    lines = [[way, *(f"{row[name]:.1f}" for name in columns)] for way, row in means.iterrows()]
    alone = single[single["way"] == "single photographs"]
    of_draws = 100 * alone["shown"] / alone["draw"]
    lines.append(["none: single photographs", f"{of_draws.mean():.1f}", *[""] * 6])
    lines.append(["the same without groceries", f"{of_draws[alone['set'] != 'groceries'].mean():.1f}", *[""] * 6])
    header = ["photographs of a subject", "noticed", "right on others", "told before", "true in the interval before"]
    return as_table([*header, "true in the range", "own images rejected before", "rejected"], lines)


def copies(part: Any = REPORTING) -> str:
    """How many copies of photographs are found, by how they were altered: of all sets, and in the worst."""
    rows = results("copies").query("set in @part and copy != 'alone'")
    shares = (100 * rows["found"] / rows["images"]).groupby(rows["copy"])
    found = pd.DataFrame({"mean": shares.mean(), "worst": shares.min()}).sort_values(["mean", "worst"], ascending=False)
    lines = [[copy, f"{row['mean']:.0f}", f"{row['worst']:.0f}"] for copy, row in found.iterrows()]
    return as_table(["a copy that is", "found, %", "in the worst dataset, %"], lines)


def whole_image() -> str:
    """Top-1 as CLIP crops an image, and with the whole of it: means over draws, and what that changes over
    the sets."""
    found = results("whole_image").pivot_table("top1", "set", "shown", sort=False)
    lines = [[name, *map("{:.1f}".format, row)] for name, row in found.iterrows()]
    changes = ["", *(report.difference_cell(found[how] - found["cropped"]) for how in found.columns[1:])]
    return as_table(["dataset", *found.columns], [*lines, ["**difference**", *changes]])


def folder(last: bool = False) -> str:
    """What the rules for a folder as a whole change, in percentage points: on the sets for reporting, or the
    last."""
    rows = results("together")
    rows = rows[rows.set.str.contains("250 more|60 even|60 odd|scenes|hand signs|corn leaves") == last]
    rows = rows.assign(features=rows.set.str.contains("miniature").map({True: "miniature", False: "ViT-B/32"}))
    few = rows[rows.images_per_class <= 4]
    lines = []
    for rule, runs in rows.groupby("rule", sort=False):
        own = few[few.rule == rule].groupby("features").change.mean()
        at_16 = runs[runs.images_per_class == 16]
        worst = runs.groupby("set").change.apply(lowest_tenth).min()
        cells = [own["ViT-B/32"], own["miniature"], at_16.change.mean()]
        lines.append([rule, *map("{:+.1f}".format, [*cells, lowest_tenth(runs.change), worst, runs.ece_change.mean()])])
    header = ["rule", "ViT-B/32, 1 to 4 images", "miniature, 1 to 4 images", "16 images", "mean of the worst tenth"]
    return as_table([*header, "the same of the worst dataset", "calibration error (ECE)"], lines)


def lowest_tenth(values: "pd.Series[float]") -> float:
    """The mean of the lowest tenth."""
    return float(values.nsmallest(max(1, len(values) // 10)).mean())


def inspected() -> str:
    """Flipped labels and suggested images, by set: means over draws, and paired differences in points."""
    rows = results("inspection").pivot_table("value", ["set", "draw"], "name", sort=False)
    header = ["dataset", "flipped labels found", "suspects, right", "accuracy lost", "regained without suspects"]
    header += ["regained without the found", "suggested over random"]
    lines = []
    for name, draws in rows.groupby(level="set", sort=False):
        means = draws.mean()
        swapped = draws["top1 swapped labels"]
        gains = [
            draws["top1 correct labels"] - swapped,
            draws["top1 without suspects"] - swapped,
            draws["top1 without those that a person finds among twice as many"] - swapped,
            draws["top1 suggested"] - draws["top1 random"],
        ]
        if gains[-1].any():
            found, suspects, right = means[["twice as many recall", "suspects", "precision"]]
            cells = [report.difference_cell(gain.dropna()) for gain in gains]
            counts = [f"{100 * found:.0f} %", f"{suspects:.0f}, {100 * right:.0f} %"] if found == found else ["-"] * 2
            lines.append([str(name), *counts, *cells])
    return as_table(header, lines)


def estimates() -> str:
    """The accuracy that `inspect` expects, by images per class, and the one on test images: means over
    draws."""
    rows = results("inspection").query("measure == 'estimates'").pivot_table("value", "name", "set", sort=False)
    numbers = sorted({int(name.split()[1]) for name in rows.index})
    cells = {
        name: [f"{rows[name][f'estimate {n}']:.0f} / {rows[name][f'accuracy {n}']:.0f}" for n in numbers]
        for name in rows
    }
    return as_table(["dataset", *map(str, numbers)], [[name, *line] for name, line in cells.items()])


def strangers() -> str:
    """Images of other sets that `inspect` says to show none of the classes: sums over the other sets and
    samples."""
    rows = results("inspection").query("measure == 'strangers'")
    counts = rows.assign(set=rows.set.str.split(" with ").str[0]).pivot_table("value", "set", "name", "sum", sort=False)
    columns = [counts["planted found"] / counts["planted"], counts["others taken for planted"] / counts["images"]]
    columns += [counts["planted found"] / (counts["planted found"] + counts["others taken for planted"])]
    lines = [[name, *(f"{100 * column[name]:.0f} %" for column in columns)] for name in counts.index]
    return as_table(["dataset", "other images found", "own images listed", "of the listed, other images"], lines)


def head_mb(model: str) -> float:
    """The size of a model's head, in MB."""
    return MODELS[model].head_mb


# ------------------------------------------------------------------------------------------------------------- renewing


def like(old: str, new: float | str) -> str:
    """A new value, written as the old one."""
    if isinstance(new, str):
        return old if old.split() == new.split() else new  # wherever its line breaks
    sign = "+" if old[0] in "+-" else ""
    return f"{new:{sign},.{len(old.partition('.')[2])}f}"


def quotes(page: Path) -> list[str]:
    """What `quotes.yaml` lists for a page."""
    listed: list[str] = yaml.safe_load(QUOTES.read_text()).get(str(page.relative_to(ROOT)), [])
    return listed


def evaluated(expression: str) -> Any:
    """What an expression of a page has now."""
    return eval(expression)


def needs(quote: str) -> str:
    """The line of the code block that an entry says not to run; "" of other entries."""
    start = NEEDS.match(quote)
    return quote[start.end() :] if start else ""


def found(quote: str, text: str) -> re.Match[str]:
    """Where an entry is; LookupError unless it is on the page once. A sentence may break over lines at a
    space."""
    if quote.startswith(TABLE):  # of a name in a list, the parameters are not looked for
        header = re.escape(evaluated(quote.removeprefix(TABLE)).partition("\n")[0].partition("`(")[0])
        pattern = rf"^{header}.*\n(?:[-| ].*\n?)+"
    elif quote.startswith(PAGE):
        pattern = r"\A[\s\S]*\Z"
    elif needs(quote):
        pattern = rf"^{re.escape(needs(quote))}$"
    else:
        sentences = [re.split(r"\s+", part) for part in HOLE.split(quote)[::2]]  # between values, as words
        pattern = VALUE.join(r"\s+".join(map(re.escape, words)) for words in sentences)
    places = list(re.finditer(pattern, text, re.MULTILINE))
    if len(places) != 1:
        raise LookupError(f"{QUOTES.name} lists what is {len(places)} times on the page, not once: {quote}")
    return places[0]


def renewed(text: str, listed: Sequence[str] = ()) -> str:
    """The page with all listed values and tables as they are now; LookupError for what has no result."""
    for quote in listed:
        place = found(quote, text)
        sources = HOLE.findall(quote)
        values = {i: evaluated(source) for i, source in enumerate(sources, 1) if not source.startswith(FROM)}
        parts = {place.span(i): like(place[i], value) for i, value in values.items()}
        if quote.startswith((TABLE, PAGE)):
            parts = {place.span(): evaluated(quote.partition(": ")[2]) + "\n"}
        text = replaced(text, parts)
    return text


def replaced(text: str, parts: Mapping[tuple[int, int], str]) -> str:
    """The text with other characters at these places."""
    for (start, end), part in sorted(parts.items(), reverse=True):
        text = text[:start] + part + text[end:]
    return text


def unmarked(text: str, listed: Sequence[str] = (), comparing: bool = False) -> list[str]:
    """Measured numbers that are not listed; where `comparing`, or in paragraphs that quote accuracies,
    comparisons."""
    places = {quote: found(quote, text) for quote in listed}
    parts = dict[tuple[int, int], str]()
    for quote, place in places.items():
        accuracies = re.search(r"\{\{(?:top1|gap|versus)\(", quote)
        whole = quote.startswith((TABLE, PAGE))
        spans = [place.span()] if whole else [place.span(i) for i in range(1, place.re.groups + 1)]
        parts |= dict.fromkeys(spans, QUOTED if accuracies else "")
    problems = []
    for paragraph in re.sub(r"```.*?```", "", replaced(text, parts), flags=re.DOTALL).split("\n\n"):
        compares = comparing or QUOTED in paragraph
        prose = ALLOWED.sub("", NOT_PROSE.sub("", paragraph))
        patterns = (MEASURED, COMPARISON)[: 2 if compares else 1]
        problems += [m[0] for pattern in patterns for m in pattern.finditer(prose)]
    return problems


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        new = renewed(text, quotes(page))
        if new != text:
            page.write_text(new)
            print("Renewed:", page.relative_to(ROOT))


if __name__ == "__main__":
    main()
