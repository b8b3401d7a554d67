"""`dcp-zoo fit-classifier`."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import log, output, progress_bar
from dcp_zoo.cli.evaluate import trained_on
from dcp_zoo.cli.options import (
    DataRoot,
    Dataset,
    Device,
    HeadName,
    Labels,
    Photos,
    Threads,
    Workers,
    check_output,
    data_source,
    head_name,
)
from dcp_zoo.data import check_images, is_own, load_labelled, training_split
from dcp_zoo.errors import ZooError
from dcp_zoo.threads import use_threads


def fit_classifier(
    head: HeadName,
    output_dir: Annotated[Path, typer.Option("--output", help="Folder for the new checkpoint; created if needed.")],
    photos: Photos = None,
    labels: Labels = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per class, at most. Default: as many as the head was trained on; all of your own images.",
        ),
    ] = None,
    device: Device = "auto",
    workers: Workers = 0,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
) -> None:
    """Give a head a classifier stage: a text probe on its image features, in seconds. Prompts are not trained.

    It needs a few labelled images of the head's classes, by default those that the head was trained on; of your
    own, those held out for the test measure the accuracy. It also calibrates the probabilities, sets the threshold
    for `predict --reject`, and lets new classes be added by images, unless the head's method is limited to its
    classes.

    [dim]dcp-zoo fit-classifier --head dcp_mini.caltech101-16shot --data-root DATA --output better[/]
    [dim]dcp-zoo fit-classifier MY_PHOTOS --head converted --output better[/]
    """
    name = head_name(head)
    dataset, data_root = data_source(photos, dataset, data_root, labels)
    check_output(output_dir)
    from dcp_zoo.training import run
    from dcp_zoo.training.device import pick_device
    from dcp_zoo.training.evaluation import measure, measurement
    from dcp_zoo.training.sources import image_source
    from dcp_zoo.training.state import remove_state
    from dcp_zoo.zoo.factory import create_model

    run.check_free(output_dir, overwrite)
    use_threads(threads)
    model = create_model(name, True).eval().to(pick_device(device))
    dataset = dataset or trained_on(head, model, data_root)
    split = training_split(load_labelled(dataset, data_root, labels), model.info.get("test_share"))
    if sorted(split.classnames) != sorted(model.classnames):
        raise ZooError(f"{dataset} has other classes than {head}: pass labelled images of the classes of the head.")
    if is_own(dataset):
        check_images(split.items)
    else:
        shots = shots or model.info.get("shots")
    seed, names = model.info.get("seed", 1), model.classnames
    found = run.fit_classifier(model, split, shots, seed, workers=workers, progress=progress_bar)
    if is_own(dataset):
        counts = Counter(item.label for item in split.train)
        model.info["class_images"] = {split.classnames[i]: min(shots or n, n) for i, n in counts.items()}
    if measured := is_own(dataset) and bool(split.test):
        metrics, evaluation = measure(image_source(model, split.test, "none", workers, progress_bar))
        model.info |= measurement(metrics, evaluation)
        output.print(f"[bold]test top-1: {evaluation.accuracy}[/]", highlight=False)
        if model.info.get("split_sha256") != split.sha256:
            log(f"{head} was trained on other images; if it saw some of these, the accuracy is too high.")
    model.set_classnames(names)  # in their order, which is that of a FewShotClassifier's labels
    model.save_pretrained(output_dir)
    remove_state(output_dir)
    chosen = f"{found['val_images']} validation images" if found["val_images"] else "the same images"
    log(f"Fitted on images of {model.num_classes} classes; weights chosen on {chosen}.")
    where = f" --data-root {data_root}" if data_root else ""
    hint = "" if measured else f" Measure it: dcp-zoo eval --head {output_dir}{where}"
    output.print(f"Saved in {output_dir}.{hint}", highlight=False)
