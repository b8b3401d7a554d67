"""The paper's few-shot protocol: train on K shots of all classes, test the last step's model, seeds 1 to 3.

    python benchmarks/few_shot.py --data-root DATA --output RUNS --csv benchmarks/results/few_shot_dcp_mini.csv

One CSV row for each accuracy; a row that is there is not computed again, so a stopped run goes on where it was.
`summary` lines (mean and spread over seeds) are printed at the end.
"""

import csv
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from dcp_zoo.cli.console import output as console
from dcp_zoo.cli.console import progress_bar, say
from dcp_zoo.data import DATASETS
from dcp_zoo.factory import create_model
from dcp_zoo.model import COUPLINGS
from dcp_zoo.runs import Run, default_recipe, plan, train_head
from dcp_zoo.training import Source, image_source, pick_device, reading, top1
from dcp_zoo.zero_shot import zero_shot_classifier, zero_shot_logits

COLUMNS = "model,weights,dataset,method,coupling,context,shots,seed,top1,images,train_seconds,torch".split(",")


def main(
    csv_file: Annotated[Path, typer.Option("--csv", help="Results; rows are added.")],
    output: Annotated[Path, typer.Option(help="Folder for the trained heads.")],
    data_root: Annotated[Path, typer.Option(help="Folder that holds the data sets in CoOp's layout.")],
    model: str = "dcp_mini",
    dataset: str = "caltech101",
    shots: Annotated[list[int], typer.Option()] = [1, 2, 4, 8, 16],  # noqa: B006
    seeds: Annotated[list[int], typer.Option()] = [1, 2, 3],  # noqa: B006
    device: str = "auto",
    precision: Annotated[str, typer.Option(help="Of training; tests are in float32.")] = "float32",
) -> None:
    """Zero-shot CLIP, and DCP in both couplings, each with batch and calibrated context."""
    runs = [
        plan(
            model,
            dataset,
            data_root,
            k,
            seed,
            replace(default_recipe(model), coupling=coupling),
            device,
            precision=precision,
        )
        for k in shots
        for coupling in COUPLINGS
        for seed in seeds
    ]
    facts = {"model": model, "weights": weights_id(model), "dataset": dataset, "torch": torch.__version__}
    clip = create_model(model, "clip").eval().to(pick_device(device))
    test = image_source(clip, runs[0].split.test, "none", progress=progress_bar)
    facts["images"] = len(test.items)
    if not has(csv_file, facts, "zero-shot", "", 0, 0):
        add(csv_file, facts | {"method": "zero-shot", "shots": 0, "seed": 0, "top1": zero_shot(test, dataset)})
    for run in runs:
        coupling = run.recipe.coupling
        if not has(csv_file, facts, "dcp", coupling, run.shots, run.seed):
            one_run(run, output, csv_file, facts, test)
    summary(csv_file)


def one_run(run: Run, output: Path, csv_file: Path, facts: dict, test: Source) -> None:
    """Train and test one head, and add its two rows."""
    name = f"{run.model}.{run.split.name}-{run.shots}shot-seed{run.seed}.{run.recipe.coupling}"
    say(name)
    trained, metrics = train_head(run, output / name, test=test, overwrite=True, progress=progress_bar)
    row = {"method": "dcp", "coupling": run.recipe.coupling, "shots": run.shots, "seed": run.seed}
    row["train_seconds"] = trained.info["train_seconds"]
    for metric, value in metrics.items():
        add(csv_file, facts | row | {"context": metric.removeprefix("top1_"), "top1": value})


def zero_shot(test: Source, dataset: str) -> float:
    """Top-1 of plain CLIP with the data set's usual template."""
    model = test.model
    classifier = zero_shot_classifier(model, model.classnames, DATASETS[dataset].template)
    with reading(test):
        logits = [zero_shot_logits(model, x.to(classifier.device), classifier).cpu() for x, _ in test.batches(100)]
    return round(top1(torch.cat(logits), test.labels), 2)


def weights_id(model: str) -> str:
    """Which CLIP weights the figures belong to: a hash of the miniature's file, or open_clip's tag."""
    from dcp_zoo.mini import MINI_WEIGHTS
    from dcp_zoo.registry import get_spec

    spec = get_spec(model)
    return spec.clip_pretrained if spec.clip else hashlib.sha256(MINI_WEIGHTS.read_bytes()).hexdigest()[:12]


def has(path: Path, facts: dict, method: str, coupling: str, shots: int, seed: int) -> bool:
    """Whether a result is in the file already."""
    if not path.exists():
        return False
    with path.open() as file:
        wanted = (facts["model"], facts["weights"], facts["dataset"], method, coupling, str(shots), str(seed))
        keys = ("model", "weights", "dataset", "method", "coupling", "shots", "seed")
        return any(tuple(row[k] for k in keys) == wanted for row in csv.DictReader(file))


def add(path: Path, row: dict) -> None:
    """Append one row, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def summary(path: Path) -> None:
    """Print mean and standard deviation over the seeds."""
    rows = pd.read_csv(path).fillna({"coupling": "", "context": ""})
    by = ["weights", "dataset", "method", "coupling", "context", "shots"]
    console.print(rows.groupby(by).top1.agg(["mean", "std", "count"]).round(2).to_string(), highlight=False)


if __name__ == "__main__":
    typer.run(main)
