"""`dcp-zoo eval` and `dcp-zoo verify`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from typer import Exit, Option

from dcp_zoo.benchmark.report.write import write_mistakes
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import log, output, plain_table, print_error, progress_bar
from dcp_zoo.data import Item, Split, check_images, is_own, load_labelled, training_split
from dcp_zoo.data.paths import check_output
from dcp_zoo.data.readers import read_descriptions
from dcp_zoo.data.seen import unseen
from dcp_zoo.data.splits import shorten, split_images
from dcp_zoo.errors import ZooError
from dcp_zoo.threads import use_threads
from dcp_zoo.training.recipes import AUTO
from dcp_zoo.zoo.registry import list_heads

if TYPE_CHECKING:
    from dcp_zoo.model.head import Head
    from dcp_zoo.training.evaluation import Evaluation

MOST = 10  # rows of each table
TEST = "test top-1"  # the accuracy on images that a head has not seen
UNKNOWN = "{} does not say which images it was trained on: if these are among them, the accuracy is too high."


def evaluate(
    head: opt.HeadName,
    photos: opt.Photos = None,
    dataset: str | None = Option(None, help="Default: the dataset the head was trained on."),
    labels: opt.Labels = None,
    data_root: opt.DataRoot = None,
    descriptions: opt.DescriptionsFile = None,
    stats: opt.Stats = None,
    batch_size: opt.BatchSize = 16,
    device: opt.Device = "auto",
    precision: opt.Precision = AUTO,
    workers: opt.Workers = 0,
    threads: opt.Threads = None,
    report: opt.Report = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure a head's top-1 accuracy on the test images of a dataset, overall and per class.

    Of your own images, those that the head was trained on are left out, wherever they are and whatever they are called.

    [dim]dcp-zoo eval --head dcp_mini.caltech101-16shot --data-root DATA[/]
    [dim]dcp-zoo eval MY_PHOTOS --head my_head --report mistakes.html[/]
    """
    name = opt.head_name(head)
    dataset, data_root = opt.data_source(photos, dataset, data_root, labels)
    if report:
        check_output(report, overwrite, "--report")
    sentences = read_descriptions(descriptions) if descriptions else None
    from dcp_zoo.api.functions import as_model
    from dcp_zoo.training.device import pick_precision
    from dcp_zoo.training.evaluation import Evaluation, predict
    from dcp_zoo.training.sources import image_source

    use_threads(threads)
    model = as_model(name, device)
    model.stats = stats or model.stats
    dataset = dataset or trained_on(head, model, data_root)
    images = load_labelled(dataset, data_root, labels)
    (test, title), shown = test_images(images, model, head), str(data_root) if dataset == "folder" else dataset
    if dataset == "folder":
        check_images(test)
    if set(images.classnames) != set(model.classnames):
        trained = f"Note: {head} was trained on {model.num_classes} classes, and is tested with the"
        log(f"{trained} {len(images.classnames)} class names of {shown}, as in the cross-dataset protocol.")
    model.set_classnames(images.classnames, sentences)
    precision = pick_precision(precision, model.architecture, model.device)
    source = image_source(model, test, "none", workers, progress_bar, precision=precision)
    evaluation = Evaluation(images.classnames, test, predict(source, batch_size, progress_bar))
    if report:
        write_mistakes(evaluation, report, f"{head} on {dataset}")
        log(f"Wrote {report}")
    if not as_json:
        kind = title.removesuffix("top-1")
        output.print(f"{head} on {len(test)} {kind}images of {shown}, {model.stats} statistics:")
        show_evaluation(evaluation, title)
        return
    top1 = round(evaluation.accuracy.percent, 2)
    result = {
        "head": head,
        "dataset": dataset,
        "images": len(test),
        "stats": model.stats,
        "precision": precision,
        "batch_size": batch_size,
        "top1": top1,
        "balanced": top1 if evaluation.balanced is None else evaluation.balanced,
        "interval": [round(bound, 2) for bound in evaluation.accuracy.interval],
        "per_class": {row.name: [row.correct, row.images] for row in evaluation.per_class},
        "confused_pairs": evaluation.confused_pairs,
    }
    print(json.dumps(result))


def test_images(images: Split, model: "Head", head: str) -> tuple[list[Item], str]:
    """The test part of a dataset; of own images without parts those held out in training, or all if it saw others. None
    of the images that the head was trained on, if it names those. And what the accuracy on them is called."""
    info, own = model.info, is_own(images.name)
    split = training_split(images, info.get("test_share") if own else None)
    same = split.sha256 in (info.get("split_sha256"), info.get("text_probe", {}).get("split_sha256"))
    items, title = images.items, TEST
    if same and (split.test or not info.get("image_hashes")):
        items = split.test
    elif images.has_parts or not own:
        items = split_images(images).test
    elif not info.get("image_hashes"):
        log(UNKNOWN.format(head))
        title = "top-1"
    if not (items := new_images(items, info, head)):
        shown = f" dcp-zoo info {head} shows its accuracy." if info.get("metrics") else ""
        advice = "Pass other images, or train with --no-refit to hold some out."
        raise ZooError(f"{head} was trained on these images.{shown} {advice}")
    return items, title


def new_images(items: list[Item], info: Mapping[str, Any], head: str) -> list[Item]:
    """The images that a head was not trained on, as far as it says on which it was; a message if some are left out."""
    new = unseen(items, info)
    if 0 < len(new) < len(items):
        log(f"Left out: {len(items) - len(new)} of {len(items)} images, as {head} was trained on them.")
    return new


def trained_on(head: str, model: "Head", data_root: Path | None) -> str:
    dataset = model.info.get("dataset")
    if dataset is None:
        raise ZooError(f"{head} does not store its training dataset: pass --dataset NAME.")
    if dataset == "folder" and data_root is None:
        classes = shorten(model.classnames)
        raise ZooError(f"{head} was trained on your own images: pass a folder with images of its classes, {classes}.")
    opt.data_source(None, dataset, data_root)
    return dataset


def show_evaluation(evaluation: "Evaluation", title: str = TEST) -> None:
    """Print the accuracy, the worst classes, pairs and mistakes."""
    output.print(f"[bold]{title}: {evaluation.accuracy}[/]")
    if evaluation.balanced is not None:
        output.print(f"balanced: {evaluation.balanced:.1f} %, the mean of the classes' accuracies")
    if not evaluation.mistakes:
        return
    classes = sorted(evaluation.per_class, key=lambda row: row.percent)
    worst = "class" if len(classes) <= MOST else f"{MOST} worst classes of {len(classes)}"
    shown = [(row, "{:.0f} to {:.0f} %".format(*row.interval)) for row in classes[:MOST]]
    accuracies = [(row.name, f"{row.correct}", f"{row.images}", interval) for row, interval in shown]
    confused = [(x.name, x.predicted, f"{x.times} of {x.images}") for x in evaluation.confused_pairs[:MOST]]
    here = f"{Path.cwd()}{os.sep}"  # paths are shown as seen from the working folder
    mistakes = [
        (x.path.removeprefix(here), x.name, x.predicted, f"{100 * x.probability:.0f} %")
        for x in evaluation.mistakes[:MOST]
    ]
    tables = [
        plain_table((worst, "correct", "of", "95 % interval"), accuracies),
        plain_table(("true class", "predicted", "times"), confused),
    ]
    output.print(Columns(tables, padding=(0, 4)))  # below each other where the terminal is narrow
    output.print(plain_table(("most confident mistakes", "true class", "predicted", "probability"), mistakes))


def verify(
    head: str | None = Option(None, help="A head, a checkpoint folder, or hf-hub:ORG/REPO."),
    data_root: opt.DataRoot = None,
    all_: bool = Option(False, "--all", help="Verify all heads inside this package."),
    device: opt.Device = "auto",
    workers: opt.Workers = 0,
) -> None:
    """Measure a head again on the test images of its dataset, and compare the result with its card's claim.

    The exit code is 1 if they differ by more than 0.05 percentage points, or a head of --all cannot be measured.

    [dim]dcp-zoo verify --head dcp_mini.caltech101-16shot --data-root DATA[/]
    [dim]dcp-zoo verify --all --data-root DATA[/]
    """
    if (head is None) != all_:
        raise ZooError("Pass one --head, or --all for those inside this package.")
    names = [opt.head_name(head)] if head else list_heads(status="bundled")
    from dcp_zoo.release.cards import verify as verified

    claims, failed = [], False
    for name in names:
        try:
            claims += verified(name, data_root, device=device, workers=workers, progress=progress_bar)
        except ZooError as error:
            if head:
                raise
            failed = True  # the others can be measured all the same
            print_error(f"{name}: {error}")
    rows = [
        (c.head, c.coupling, c.stats, f"{c.claimed:.2f}", f"{c.measured:.2f}", "holds" if c.holds else "differs")
        for c in claims
    ]
    output.print(plain_table(("head", "coupling", "stats", "claimed", "measured", ""), rows))
    if failed or not all(claim.holds for claim in claims):
        raise Exit(1)
