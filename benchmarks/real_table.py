"""The table that the miniature cannot give: a real CLIP on public datasets, by several methods, three draws
each.

    python benchmarks/real_table.py --model small --data-root DATA --output TABLE --dry-run     what it takes
    python benchmarks/real_table.py --model small --data-root DATA --output TABLE

It downloads the datasets that are missing, resumes when repeated, and writes TABLE/submission.csv, which
`submit.py` checks; `dcp-zoo report TABLE` has more of each trial. All methods have the recipes of this
package.
"""

import json
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from typer import Option, Typer

from dcp_zoo.benchmark import Settings, pace, plan_trials, store
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.cli import main
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.benchmark import check_succeeded, download_all, numbers, show_event, split_commas
from dcp_zoo.cli.console import log, output
from dcp_zoo.data import download as downloads
from dcp_zoo.data import list_datasets
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.files import check_writable
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.threads import use_threads
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.methods.base import Method
from dcp_zoo.training.methods.linear import fit_zero_shot
from dcp_zoo.training.methods.table import GROUP
from dcp_zoo.training.methods.text_probe import TextProbeRecipe
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.specs import get_spec

app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
DATASETS = "caltech101,eurosat,dtd"  # a gigabyte together; oxford_flowers, oxford_pets and ucf101 are the next larger
EMBEDDING = "text-probe-embedding"
TITLES = {
    "zero-shot": "zero-shot",
    "linear-probe": "logistic regression",
    EMBEDDING: "text probe, CLIP's embedding alone",
    "text-probe": "text probe, all that it reads",
    "dcp, no_classifier": "DCP alone",
    "dcp": "DCP with text probes",
}


class EmbeddingHead(LinearHead):
    """A head that reads CLIP's embedding, and not what the image tower has before it."""

    @property
    def available_readings(self) -> Any:
        return [reading.only() for reading in super().available_readings]


def fit_embedding(task: Task) -> LinearHead:
    head = fit_zero_shot(task)
    head.__class__ = EmbeddingHead
    return head


PROBE = METHODS["text-probe"]
EMBEDDING_PROBE = Method(
    EMBEDDING, "Text probe, embedding", PROBE.reference, fit_embedding, TextProbeRecipe, PROBE.abilities
)


@app.command(cls=opt.Command)
def real_table(
    output_dir: Annotated[Path, Option("--output", help="Folder for results, from which it resumes.")],
    data_root: Annotated[Path, Option(help="Folder with the datasets; what is missing is downloaded.")],
    model: Annotated[str, Option(help="A model of the zoo, or small, medium, large.")] = "small",
    datasets: Annotated[str, Option(help="Of the zoo.")] = DATASETS,
    shots: Annotated[str, Option(help="Training images per class.")] = "4,16",
    seeds: Annotated[str, Option(help="Of the draws.")] = "1,2,3",
    agree: opt.Agree = False,
    device: opt.Device = "auto",
    precision: opt.Precision = "float32",
    dry_run: Annotated[bool, Option("--dry-run", help="Measure a step, and show hours and downloads.")] = False,
) -> None:
    """Measure a real CLIP with the methods of this package, and write a table to submit.

    [dim]python benchmarks/real_table.py --data-root DATA --output TABLE --dry-run[/]
    """
    METHODS[EMBEDDING] = EntryPoint(EMBEDDING, "real_table:EMBEDDING_PROBE", GROUP)
    spec = get_spec(model)
    names = split_commas([datasets])
    trials = plan_trials(
        "few-shot",
        [spec.name],
        [name for name in TITLES if "," not in name],
        names,
        numbers([shots], "--shots"),
        numbers([seeds], "--seeds"),
    )
    done = store.done(output_dir)
    left = [trial for trial in trials if trial.key not in done]
    missing = downloads.missing(names, data_root)
    settings = Settings(output_dir, data_root, device, precision)
    for line in pace.costs(left, missing, settings):
        output.print(line, soft_wrap=True)
    if dry_run:
        return
    check_writable(output_dir)
    use_threads()
    absent = download_all(missing, data_root, agree)
    if absent:
        raise ZooError(f"Not complete: {', '.join(absent)}. Repeat the command to resume.")
    failed = sweep(trials, settings, show=show_event)
    results = store.results(output_dir)
    table = measured(results[trial.key] for trial in trials if trial.key in results)
    shown = table.pivot_table("top1", ["shots", "method"], "dataset", sort=False).round(1)
    output.print(shown.to_string(na_rep=""), markup=False)
    write_csv(output_dir / "submission.csv", table)
    check_succeeded(failed, trials)


def measured(results: Iterable[Values]) -> pd.DataFrame:
    """Top-1 of each draw, without batch statistics, in the order of `TITLES`, and what a `Submission` says
    of it."""
    order = list(TITLES)
    rows = []
    for result in results:
        trial = result["trial"]
        for entry in result["results"]:
            name = f"{trial['method']}, {entry['stats']}".removesuffix(", ").removesuffix(", stored")
            if name not in TITLES:
                continue
            row = {
                **trial,
                "split_sha256": result["split_sha256"],
                "recipe": result["recipe"],
                "selection": result["selection"],
                "reference": METHODS[trial["method"]].reference,
                "order": order.index(name),
                "method": TITLES[name],
                "top1": entry["top1"],
            }
            rows.append(row)
    return pd.DataFrame(rows).sort_values(["shots", "order"], kind="stable")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """The fields of a `Submission` as columns, each value as JSON: the mean over the draws of a method,
    dataset and number of images. Not of zero-shot CLIP, which trains on none, and of datasets of no
    leaderboard."""
    listed = table[table.dataset.isin(list_datasets()) & (table.shots > 0)]
    rows = []
    for _, draws in listed.groupby(["method", "dataset", "shots"], sort=False):
        first = draws.iloc[0]
        spec = get_spec(first.model)
        row = {
            "by": "not stated",
            "where": "https://github.com/dcp-zoo/dcp_zoo",
            "method": first.method,
            "reference": first.reference,
            "model": f"{spec.clip} {spec.clip_pretrained}",
            "pretraining_data": "that of the model",
            "dataset": first.dataset,
            "shots": int(first.shots),
            "seeds": draws.seed.tolist(),
            "split_sha256": first.split_sha256,
            "recipe": first.recipe,
            "selection": first.selection,
            "test_images_used": False,
            "test_time_optimisation": False,
            "deterministic": True,
            "license": "apache-2.0",
            "reported": round(draws.top1.mean(), 2),
        }
        rows.append({name: json.dumps(value) for name, value in row.items()})
    pd.DataFrame(rows).to_csv(path, index=False)
    log(f"Wrote {path}, {len(rows)} rows: check it with python benchmarks/submit.py.")


if __name__ == "__main__":
    main(app)
