"""`dcp-zoo eval`: a trained head is measured on images, by the labels of all or of a few, or two are compared."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.columns import Columns
from typer import Exit, Option

import dcp_zoo
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import from_here, log, output, plain_table, progress_bar
from dcp_zoo.data import Item, Split, find_spec, is_user_data, load_labelled, training_split
from dcp_zoo.data.splits import not_trained_on, split_images
from dcp_zoo.data.unreadable import all_named
from dcp_zoo.errors import ZooError, as_zoo_error, shorten
from dcp_zoo.features import AUTO
from dcp_zoo.fields import Values
from dcp_zoo.files import check_output, printable
from dcp_zoo.rejection import REFUSED
from dcp_zoo.tables import STRATUM, read_csv
from dcp_zoo.threads import use_threads

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head
    from dcp_zoo.inspection.spot_check import SpotCheck
    from dcp_zoo.training.evaluation import Evaluation

MOST = 10  # rows of each table
TEST = "test top-1"  # the accuracy on images that a head has not seen


class Measured(NamedTuple):
    """A head, and what it says of test images."""

    name: str
    head: "Head"
    metrics: Mapping[str, float]  # top-1 in percent, see `evaluation.measure`
    evaluation: "Evaluation"
    conditions: Values  # on which that depends


def evaluate(
    heads: opt.HeadNames,
    photos: opt.Images = None,
    labels: opt.Labels = None,
    data_root: opt.DataRoot = None,
    claim: bool = Option(False, "--claim", help="Compare with the accuracies that its card or checkpoint states."),
    label: int | None = Option(
        None, min=2, help="Of PHOTOS without labels: choose so many to look at, to know the accuracy on all."
    ),
    output_dir: Path | None = Option(None, "--output", help="With --label: new folder for a page and a table."),
    device: opt.Device = "auto",
    precision: opt.Precision = AUTO,
    report: opt.Report = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure a head's top-1 accuracy on the test images of a dataset, overall and per class; or compare two.

    Images are classified into all classes of the head, also where a folder has images of some of them only.
    Of a dataset with other classes, the head classifies into these instead, as in the cross-dataset
    protocol. With --claim the exit code is 1 if an accuracy differs from the stated one by more than 0.05
    percentage points. Of your own images, those that the head was trained on are left out, wherever they are
    and whatever they are called. With a second --head, it says which is better on images that neither was
    trained on, and what each costs. Of a folder without labels, --label chooses a few images to look at; with
    the table that a person has filled in, eval says what the head is worth on the whole folder.

    [dim]dcp-zoo eval --head dcp_mini.caltech101-16shot --data-root DATA[/]
    [dim]dcp-zoo eval MY_PHOTOS --head my_head --report mistakes.html[/]
    [dim]dcp-zoo eval MY_PHOTOS --head my_head --head other_head[/]
    [dim]dcp-zoo eval NEW_PHOTOS --head my_head --label 30 --output check[/]
    [dim]dcp-zoo eval NEW_PHOTOS --head my_head --labels check/found.csv[/]
    [dim]dcp-zoo eval --head dcp_mini.caltech101-16shot --data-root DATA --claim[/]
    """
    if claim and as_json:
        raise ZooError("--claim prints a table: omit --json.")
    if len(heads) > 2:
        raise ZooError("eval measures one head or compares two: pass --head once or twice.")
    if len(heads) == 2 and (claim or report):
        raise ZooError("--claim and --report are for one head: omit them, or the second --head.")
    dataset, data_root = opt.data_source(photos, data_root, labels)
    if report:
        check_output(report, overwrite, "--report")
    use_threads()
    # a few images of a folder, for what a head is worth on all
    if label or (labels and is_spot_check(labels[0])):
        if len(heads) == 2 or claim or report or photos is None or dataset != "folder":
            raise ZooError("--label, and its table, are for one head and a folder, without --claim or --report.")
        found = dcp_zoo.spot_check(
            photos,
            heads[0],
            label=label,
            labels=labels[0] if labels else None,
            output=output_dir,
            device=device,
            precision=precision,
            progress=progress_bar,
        )
        show_spot_check(found, output_dir, as_json)
        return
    from dcp_zoo.prediction.heads import loaded
    from dcp_zoo.release import claimed

    models = [loaded(name, device) for name in heads]
    claims = claimed(heads[0], models[0]) if claim else {}
    dataset = dataset or trained_on(heads[0], models[0], data_root)
    images = load_labelled(dataset, data_root, labels)
    log(printable(images.note))
    place = str(data_root) if dataset == "folder" else dataset
    answers = measured(heads, models, images, precision, claim)
    # two heads
    if len(heads) == 2:
        show_comparison(answers, place, as_json)
        return
    # one
    name, _, metrics, evaluation, conditions = answers[0]
    if report:
        report_mistakes(evaluation, report, f"{name} on {dataset}")
    if as_json:
        print(json.dumps({"head": name, "dataset": dataset} | conditions | as_values(evaluation)))
        return
    output.print(f"{name} on {len(evaluation)} images of {place}, {conditions['stats']} statistics:", markup=False)
    show_evaluation(evaluation)
    if claim:
        show_claims(claims, metrics)


def measured(
    names: Sequence[str], heads: Sequence["Head"], images: Split, precision: str, claim: bool
) -> list[Measured]:
    """Heads on the same images, of which none was trained on any."""
    from dcp_zoo.features import group_own_images, shared_features

    able = [test_images(images, head, name, claim) for name, head in zip(names, heads, strict=True)]
    common = set.intersection(*[{item.key for item in items} for items in able])
    test = [item for item in able[0] if item.key in common]
    if not test:
        raise ZooError(f"Each of these images is one that {' or '.join(names)} was trained on: pass other images.")
    with shared_features(), all_named(test):  # two heads often read the same CLIP
        if images.name == "folder":
            test = group_own_images(test)
        return [answered(name, head, test, images, precision, claim) for name, head in zip(names, heads, strict=True)]


def answered(name: str, head: "Head", test: Sequence[Item], images: Split, precision: str, claim: bool) -> Measured:
    """What a head says of test images of a split, in all modes for a `claim`. Of a dataset with other classes it
    classifies into these."""
    from dcp_zoo.api.inputs import among
    from dcp_zoo.features import FeatureExtractor, ImageLoader, Photos, pick_precision
    from dcp_zoo.training.evaluation import measure

    if not is_user_data(images.name) and set(images.classnames) != set(head.classnames):
        log(f"Note: {name} is tested with the class names of {images.name}, as in the cross-dataset protocol.")
        head.set_classnames(images.classnames, find_spec(images.name).template)
    items = among(test, images.classnames, head.classnames)
    recipe = head.info.get("recipe", {})
    batch_size = recipe.get("eval_batch_size", 16)
    if claim and precision == AUTO:  # as it was measured
        precision = recipe.get("precision", AUTO)
    precision = pick_precision(precision, head.encoder.architecture, head.device)
    loader = ImageLoader(Photos(items), FeatureExtractor(head.frozen, precision, progress_bar))
    metrics, evaluation = measure(head, loader, batch_size, all_modes=claim)
    conditions = {"stats": head.stats, "precision": precision, "batch_size": batch_size}
    return Measured(name, head, metrics, evaluation, conditions)


def show_comparison(answers: Sequence[Measured], place: str, as_json: bool) -> None:
    """Print which of two heads is better on the images that both were measured on, and the size and cost of
    both."""
    from dcp_zoo.data.groups import groups_text  # after NumPy, which is slow
    from dcp_zoo.features.device import seconds_per_image
    from dcp_zoo.training.comparison import Comparison

    compared = Comparison(*[answer.evaluation for answer in answers])
    rows = list[Values]()
    for name, head, _, evaluation, conditions in answers:
        size = head.pretrained_cfg["input_size"]
        row: Values = {
            "head": name,
            "top1": round(evaluation.accuracy.percent, 2),
            "parameters": sum(parameter.numel() for parameter in head.parameters()),
            "seconds_per_image": seconds_per_image(head, size, head.device, conditions["precision"]),
        }
        rows.append(row)
    low, high = compared.interval
    if as_json:
        values = {
            "heads": rows,
            "images": len(compared.first),
            "groups": len(compared.gains),
            "difference": round(compared.difference, 2),
            "interval": [round(low, 2), round(high, 2)],
            "p_value": compared.p_value,
            "verdict": compared.verdict,
        }
        print(json.dumps(values))
        return
    counted = groups_text(compared.first.items) or f"{len(compared.first):,} images"
    output.print(f"{counted}, of {place}, that neither head was trained on, as far as they say:", markup=False)
    cells = []
    for letter, row in zip("AB", rows, strict=True):
        size = f"{row['parameters'] / 1e6:.1f} M"
        cost = f"{1000 * row['seconds_per_image']:.1f} ms"
        cells.append((f"{letter}: {row['head']}", f"{row['top1']:.1f} %", size, cost))
    output.print(plain_table(("head", "top-1", "parameters", "per image, here"), cells))
    only_first, only_second = compared.wins
    output.print(
        f"A minus B: {compared.difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}; of images, or groups, "
        f"only A has {only_first} right, only B {only_second} (exact McNemar test, p = {compared.p_value:.2g})",
        soft_wrap=True,
    )
    output.print(f"[bold]{compared.verdict}[/]")


def is_spot_check(table: Path) -> bool:
    """Whether a labels file is a table that --label wrote."""
    with as_zoo_error(f"Cannot read {table} ({{}})."):
        return STRATUM in read_csv(table)[0]


def show_spot_check(found: "SpotCheck", output_dir: Path | None, as_json: bool) -> None:
    """Print which images of a folder to label, or what their labels say of all."""
    from dcp_zoo.inspection.search import PAGE, TABLE

    told = found.accuracy
    if as_json:
        print(json.dumps(asdict(found)))
        return
    for row in found.to_label:
        output.print(f"{row.note}  {row.file}", markup=False, soft_wrap=True)
    if found.to_label and output_dir:
        table = output_dir / TABLE
        log(f"Look at {output_dir / PAGE}, fill in the column class of {table}, and add --labels {table}.")
    if told:
        least = f"at least {math.floor(told.low)} % (97.5 % sure)"
        output.print(f"[bold]top-1 on all {found.images:,} images: {least}: {told}[/]")
        show_refused(found.refused)
        rows = [(each.name, f"{each.allowed:.0f} %", str(each.failed), each.verdict) for each in found.promises]
        if rows:
            output.print(plain_table(("promised", "at most", "here", ""), rows))
        output.print(f"About {found.more_labels:,} more labels would halve the interval.")


def as_values(evaluation: "Evaluation") -> Values:
    """What --json prints of the predictions."""
    return {
        "top1": round(evaluation.accuracy.percent, 2),
        "interval": [round(bound, 2) for bound in evaluation.accuracy.interval],
        "per_class": {row.name: [row.correct, row.images] for row in evaluation.per_class},
        "confused_pairs": evaluation.confused_pairs,
        **evaluation.info,
    }


def test_images(images: Split, head: "Head", name: str, claim: bool) -> list[Item]:
    """The test part of a dataset; of the user's images without parts those held out in training, or all if
    it saw others. None of the images that the head was trained on, if it names those. ZooError if these images
    measure no `claim`."""
    info = head.info
    split = training_split(images, info.get("test_share"))
    is_same = split.sha256 == info.get("split_sha256")
    if claim and not is_same:
        sha256 = info.get("split_sha256")
        raise ZooError(f"{name} was trained on another split of {images.name}: its sha256 is {sha256}.")
    items = images.items
    if is_same and (split.test or not info.get("image_hashes")):
        items = split.test
    elif images.has_parts or not is_user_data(images.name):
        items = split_images(images).test
    elif not info.get("image_hashes"):
        log(f"{name} does not say which images it was trained on: if these are among them, the accuracy is too high.")
    new = not_trained_on(items, info)
    if 0 < len(new) < len(items):
        log(f"Left out: {len(items) - len(new)} of {len(items)} images, as {name} was trained on them.")
    if not new:
        raise ZooError(
            f"{name} was trained on these images: pass others, or train with --no-refit to hold some out. "
            f"What is known: dcp-zoo info {name}"
        )
    return new


def trained_on(name: str, head: "Head", data_root: Path | None) -> str:
    """The dataset of a head's training images; ZooError for the user's own if they are not given."""
    dataset: str = head.info.get("dataset") or "folder"
    if dataset == "folder" and data_root is None:
        problem = f"{name} was trained on your own images"
        raise ZooError(f"{problem}: pass a folder with images of its classes, {shorten(head.classnames)}.")
    return dataset


def report_mistakes(evaluation: "Evaluation", page: Path, title: str) -> None:
    from dcp_zoo.training.mistakes import write_mistakes  # after torch, which is slow

    write_mistakes(evaluation, page, title)
    log(f"Wrote {page}")


def show_evaluation(evaluation: "Evaluation", title: str = TEST) -> None:
    """Print the accuracy, the worst classes, pairs and mistakes."""
    output.print(f"[bold]{title}: {evaluation.accuracy}[/]")
    if evaluation.balanced is not None:
        output.print(f"balanced: {evaluation.balanced:.1f} %, the mean of the classes' accuracies")
    show_refused(evaluation.info.get("refused"))
    if not evaluation.mistakes:
        return
    classes = sorted(evaluation.per_class, key=lambda row: row.percent)
    worst = []
    for row in classes[:MOST]:
        low, high = row.interval
        worst.append((row.name, f"{row.correct}", f"{row.images}", f"{low:.0f} to {high:.0f} %"))
    pairs = [(pair.name, pair.predicted, f"{pair.times} of {pair.images}") for pair in evaluation.confused_pairs[:MOST]]
    mistakes = [
        (from_here(mistake.item.name), mistake.name, mistake.predicted, f"{100 * mistake.probability:.0f} %")
        for mistake in evaluation.mistakes[:MOST]
    ]
    tables = [
        plain_table(("worst classes", "correct", "of", "95 % interval"), worst),
        plain_table(("true class", "predicted", "times"), pairs),
    ]
    output.print(Columns(tables, padding=(0, 4)))  # below each other where the terminal is narrow
    output.print(plain_table(("most confident mistakes", "true class", "predicted", "probability"), mistakes))


def show_refused(percent: float | None) -> None:
    """Print how many images are refused, of a head that can."""
    if percent is not None:
        output.print(f"--reject refuses {percent:.1f} % of these images, where {100 * REFUSED:g} % is promised")


def show_claims(claims: Mapping[str, float], metrics: Mapping[str, float]) -> None:
    """Print claimed and measured top-1 accuracies in percent; Exit with code 1 if one does not hold."""
    from dcp_zoo.release import holds

    rows = []
    for stats, claimed in claims.items():
        found = metrics.get(f"top1_{stats}", math.nan)
        rows.append((stats, f"{claimed:.2f}", f"{found:.2f}", "holds" if holds(claimed, found) else "differs"))
    output.print(plain_table(("statistics", "claimed", "measured", ""), rows))
    if "differs" in [row[-1] for row in rows]:
        raise Exit(1)
