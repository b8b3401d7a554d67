"""`dcp-zoo eval`: a trained head is measured on images."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.columns import Columns
from typer import Exit, Option

from dcp_zoo.benchmark.report import write_mistakes
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import from_here, log, output, plain_table, progress_bar
from dcp_zoo.data import Item, Split, check_images, find_spec, is_own, load_labelled, training_split
from dcp_zoo.data.splits import shorten, split_images, unseen
from dcp_zoo.data.unreadable import MOVE, refuse
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.files import check_output, printable
from dcp_zoo.tables import REFUSED
from dcp_zoo.threads import use_threads
from dcp_zoo.training.recipes import AUTO

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head
    from dcp_zoo.training.evaluation import Evaluation

MOST = 10  # rows of each table
TEST = "test top-1"  # the accuracy on images that a head has not seen
UNKNOWN = "{} does not say which images it was trained on: if these are among them, the accuracy is too high."


def evaluate(
    head: opt.HeadName,
    photos: opt.Images = None,
    labels: opt.Labels = None,
    data_root: opt.DataRoot = None,
    claim: bool = Option(False, "--claim", help="Compare with the accuracies that its card or checkpoint states."),
    device: opt.Device = "auto",
    precision: opt.Precision = AUTO,
    report: opt.Report = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure a head's top-1 accuracy on the test images of a dataset, overall and per class.

    Images are classified into all classes of the head, also where a folder has images of some of them only. Of a
    dataset with other classes, the head classifies into these instead, as in the cross-dataset protocol.
    With --claim the exit code is 1 if an accuracy differs from the stated one by more than 0.05 percentage points.
    Of your own images, those that the head was trained on are left out, wherever they are and whatever they are called.

    [dim]dcp-zoo eval --head dcp_mini.caltech101-16shot --data-root DATA[/]
    [dim]dcp-zoo eval MY_PHOTOS --head my_head --report mistakes.html[/]
    [dim]dcp-zoo eval --head dcp_mini.caltech101-16shot --data-root DATA --claim[/]
    """
    if claim and as_json:
        raise ZooError("--claim prints a table: omit --json.")
    name = opt.head_name(head)
    dataset, data_root = opt.data_source(photos, data_root, labels)
    if report:
        check_output(report, overwrite, "--report")
    from dcp_zoo.api.inputs import among
    from dcp_zoo.prediction.heads import loaded
    from dcp_zoo.release import claimed

    use_threads()
    model = loaded(name, device)
    claims = claimed(name, model) if claim else None
    crosses = dataset is not None and not is_own(dataset)
    dataset = dataset or trained_on(head, model, data_root)
    images = load_labelled(dataset, data_root, labels)
    if images.note:
        log(printable(images.note))
    test, title = test_images(images, model, head, claim)
    shown = str(data_root) if dataset == "folder" else dataset
    if dataset == "folder":
        check_images(test)
    if crosses and set(images.classnames) != set(model.classnames):
        trained = f"Note: {head} was trained on {model.num_classes} classes, and is tested with the"
        log(f"{trained} {len(images.classnames)} class names of {shown}, as in the cross-dataset protocol.")
        model.set_classnames(images.classnames, find_spec(dataset).template)
    items = among(test, images.classnames, model.classnames)
    evaluation, metrics, conditions = _measured(model, items, claim, precision)
    if report:
        write_mistakes(evaluation, report, f"{head} on {dataset}")
        log(f"Wrote {report}")
    if as_json:
        print(json.dumps({"head": head, "dataset": dataset, **conditions, **as_values(evaluation)}))
        return
    kind = title.removesuffix("top-1")
    output.print(f"{head} on {len(test)} {kind}images of {shown}, {model.stats} statistics:", markup=False)
    show_evaluation(evaluation, title)
    if claims:
        compare(claims, metrics)


def _measured(
    model: "Head", test: Sequence[Item], claim: bool, precision: str
) -> tuple["Evaluation", dict[str, float], Values]:
    """What the head says of the images; for a claim the accuracies with all statistics; and the conditions."""
    import torch

    from dcp_zoo.prediction.heads import HeadBackend, promised
    from dcp_zoo.training.device import pick_precision
    from dcp_zoo.training.evaluation import measured, predict_modes

    recipe = model.info.get("recipe", {})
    batch_size = recipe.get("eval_batch_size", 16)
    if claim and precision == AUTO:  # as it was measured
        precision = recipe.get("precision", AUTO)
    precision = pick_precision(precision, model.encoder.architecture, model.device)

    refused = list[torch.Tensor | None]()

    def read() -> tuple[torch.Tensor, torch.Tensor | None]:
        backend = HeadBackend(model, claim and model.stats == "stored", precision, promised(model), alone=False)
        broken, outputs = backend.outputs([item.path for item in test], batch_size, progress_bar)
        refuse(test, broken, MOVE)
        rejected, features = (None if part is None else torch.from_numpy(part) for part in outputs[1:])
        refused.append(rejected)
        return torch.from_numpy(outputs.logits), features

    conditions = {"stats": model.stats, "precision": precision, "batch_size": batch_size}
    modes = predict_modes(model, read)[0] if claim else {model.stats: read()[0]}
    metrics, evaluation = measured(modes, refused[0], model.classnames, test)
    return evaluation, metrics, conditions


def as_values(evaluation: "Evaluation") -> Values:
    top1 = round(evaluation.accuracy.percent, 2)
    return {
        "images": len(evaluation.items),
        "top1": top1,
        "balanced": top1 if evaluation.balanced is None else evaluation.balanced,
        "interval": [round(bound, 2) for bound in evaluation.accuracy.interval],
        "per_class": {row.name: [row.correct, row.images] for row in evaluation.per_class},
        "confused_pairs": evaluation.confused_pairs,
        "refused": evaluation.info.get("refused"),
    }


def test_images(images: Split, model: "Head", head: str, claim: bool) -> tuple[list[Item], str]:
    """The test part of a dataset; of the user's images without parts those held out in training, or all if it saw
    others. None of the images that the head was trained on, if it names those. And what the accuracy on them is called.
    ZooError if these images measure no `claim`."""
    info, is_users = model.info, is_own(images.name)
    split = training_split(images, info.get("test_share"))
    same = split.sha256 == info.get("split_sha256")
    if claim and not same:
        hashes = f"its sha256 is {info.get('split_sha256')}, and that of the one here is {split.sha256}"
        raise ZooError(f"{head} was trained on another split of {images.name}: {hashes}.")
    items, title = images.items, TEST
    if same and (split.test or not info.get("image_hashes")):
        items = split.test
    elif images.has_parts or not is_users:
        items = split_images(images).test
    elif not info.get("image_hashes"):
        log(UNKNOWN.format(head))
        title = "top-1"
    new = unseen(items, info)
    if 0 < len(new) < len(items):
        log(f"Left out: {len(items) - len(new)} of {len(items)} images, as {head} was trained on them.")
    if not new:
        shown = f" dcp-zoo info {head} shows its accuracy." if info.get("metrics") else ""
        advice = "Pass other images, or train with --no-refit to hold some out."
        raise ZooError(f"{head} was trained on these images.{shown} {advice}")
    return new, title


def trained_on(head: str, model: "Head", data_root: Path | None) -> str:
    dataset = model.info.get("dataset")
    if dataset is None:
        raise ZooError(f"{head} does not store its training dataset: pass your images, or the name of a dataset.")
    if dataset == "folder" and data_root is None:
        classes = shorten(model.classnames)
        raise ZooError(f"{head} was trained on your own images: pass a folder with images of its classes, {classes}.")
    opt.check_data_root(dataset, data_root)
    return dataset


def show_evaluation(evaluation: "Evaluation", title: str = TEST) -> None:
    """Print the accuracy, the worst classes, pairs and mistakes."""
    output.print(f"[bold]{title}: {evaluation.accuracy}[/]")
    if evaluation.balanced is not None:
        output.print(f"balanced: {evaluation.balanced:.1f} %, the mean of the classes' accuracies")
    if (refused := evaluation.info.get("refused")) is not None:
        output.print(f"--reject refuses {refused:.1f} % of these images, where {100 * REFUSED:g} % is promised")
    if not evaluation.mistakes:
        return
    classes = sorted(evaluation.per_class, key=lambda row: row.percent)
    worst = "class" if len(classes) <= MOST else f"{MOST} worst classes of {len(classes)}"
    shown = [(row, "{:.0f} to {:.0f} %".format(*row.interval)) for row in classes[:MOST]]
    accuracies = [(row.name, f"{row.correct}", f"{row.images}", interval) for row, interval in shown]
    confused = [(x.name, x.predicted, f"{x.times} of {x.images}") for x in evaluation.confused_pairs[:MOST]]
    mistakes = [
        (from_here(x.path), x.name, x.predicted, f"{100 * x.probability:.0f} %") for x in evaluation.mistakes[:MOST]
    ]
    tables = [
        plain_table((worst, "correct", "of", "95 % interval"), accuracies),
        plain_table(("true class", "predicted", "times"), confused),
    ]
    output.print(Columns(tables, padding=(0, 4)))  # below each other where the terminal is narrow
    output.print(plain_table(("most confident mistakes", "true class", "predicted", "probability"), mistakes))


def compare(claims: Mapping[str, float], metrics: Mapping[str, float]) -> None:
    """Print claimed and measured top-1 accuracies in percent; Exit with code 1 if one does not hold."""
    from dcp_zoo.release import holds

    pairs = {stats: (top1, metrics.get(f"top1_{stats}", math.nan)) for stats, top1 in claims.items()}
    rows = [(k, *(f"{top1:.2f}" for top1 in pair), "holds" if holds(*pair) else "differs") for k, pair in pairs.items()]
    output.print(plain_table(("statistics", "claimed", "measured", ""), rows))
    if not all(holds(*pair) for pair in pairs.values()):
        raise Exit(1)
