"""`dcp-zoo benchmark` and `dcp-zoo report`."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dcp_zoo.cli.console import log, output
from dcp_zoo.cli.options import (
    DataRoot,
    DescriptionsFile,
    Device,
    Precision,
    Threads,
    Workers,
    check_output,
    cli_option,
    parse_changes,
    takes_options,
    uses_data_root,
)
from dcp_zoo.data.class_file import read_descriptions
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.threads import use_threads
from dcp_zoo.training.methods import METHODS

if TYPE_CHECKING:
    from dcp_zoo.benchmark import Settings, Trial
    from dcp_zoo.benchmark.estimate import TimeEstimator

GRID = "Grid (comma-separated lists or repeated options)"
RAY = "Cluster"


def several(help: str, *names: str, **settings: Any) -> Any:
    """An option that takes several values."""
    return cli_option([], help, *names, rich_help_panel=GRID, **settings)


def on_cluster(help: str, **limits: Any) -> Any:
    """An option for runs on Ray; None leaves the default of `Resources`."""
    return cli_option(None, help, rich_help_panel=RAY, **limits)


@dataclass(frozen=True)
class BenchmarkOptions:
    """The options of `dcp-zoo benchmark`."""

    protocol: Annotated[
        str, typer.Argument(help="few-shot, base-to-new, cross-dataset, domain-shift", metavar="PROTOCOL")
    ]
    output_dir: Path | None = cli_option(None, "Folder for results; finished trials are skipped.", "--output")
    models: list[str] = several("Models of the zoo. Default: dcp_mini.", "--models", "--model")
    methods: list[str] = several(
        f"{', '.join(METHODS)}. Default: all that the protocol and the data allow.", "--methods", "--method"
    )
    datasets: list[str] = several(
        "Training datasets. Default: all 11; for cross-dataset and domain-shift imagenet; with --features, its own."
    )
    shots: list[str] = several(
        "Training images per class. Default: 1,2,4,8,16 for few-shot, else 16; with --features, those it has."
    )
    seeds: list[str] = several("Seeds. Default: the paper's, 1,2,3; with --features, 1.")
    changes: list[str] = several(
        "Change a field in all recipes that have it: depth=3, or depth=1,3,5 for a grid. dcp-zoo train --help lists "
        "DCP's fields.",
        "--set",
        metavar="NAME=VALUE",
    )
    data_root: DataRoot = None
    descriptions: DescriptionsFile = None
    features: Path | None = cli_option(
        None, "Folder of DATASET.npz files with image features, in place of images and CLIP: docs/benchmarks.md."
    )
    device: Device = "auto"
    precision: Precision = "float32"
    workers: Workers = 0
    threads: Threads = None
    dry_run: bool = cli_option(False, "Show the plan and an estimate of its time.")
    per_class: bool = cli_option(False, "Store the accuracy of every class.")
    confusion: bool = cli_option(False, "Store the confusion matrix.")
    ray: str | None = on_cluster("Run in parallel on Ray: a cluster's address, or `local`.")
    cpus: float | None = on_cluster("Cores per trial. Default: 1.")
    gpus: float | None = on_cluster("GPUs per trial; with 0.5, two trials share one. Default: 1 if there are any.")
    retries: int | None = on_cluster("Further attempts after a worker died. Default: 2.", min=0)

    def trials(self) -> "tuple[list[Trial], str]":
        """The planned trials, and what --features left out of the defaults."""
        grid: dict[str, Any] = {"methods": split_commas(self.methods), "datasets": split_commas(self.datasets)}
        grid |= {"shots": numbers(self.shots, "--shots"), "seeds": numbers(self.seeds, "--seeds")}
        grid |= {"options": parse_changes(self.changes)}
        models = split_commas(self.models)
        if self.descriptions:
            read_descriptions(self.descriptions)  # its errors come before any work
        if self.features and self.descriptions:
            raise ZooError("--features holds the text features already: omit --descriptions.")
        from dcp_zoo.benchmark.features import plan_given
        from dcp_zoo.benchmark.plan import plan_trials

        if self.features:
            return plan_given(self.features, self.protocol, models, **grid)
        return plan_trials(self.protocol, models or ["dcp_mini"], **grid), ""

    def settings(self) -> "Settings":
        """What all trials share: the options of the same names."""
        from dcp_zoo.benchmark import Settings

        shared = {part.name: getattr(self, part.name) for part in fields(Settings) if hasattr(self, part.name)}
        return Settings(self.output_dir or Path(), **shared)


@takes_options
def benchmark(options: BenchmarkOptions) -> None:
    """Run one of the paper's protocols for DCP and the baselines, and gather the results.

    The same command resumes a stopped sweep; several processes may share a folder.

    [dim]dcp-zoo benchmark few-shot --datasets caltech101 --data-root DATA --output SWEEP --dry-run[/]
    [dim]dcp-zoo benchmark base-to-new --methods coop,dcp --datasets caltech101 --data-root DATA --output SWEEP[/]
    [dim]dcp-zoo benchmark few-shot --methods dcp --shots 4 --set depth=1,3,5 --data-root DATA --output ABLATION[/]
    [dim]dcp-zoo benchmark few-shot --models dcp_vitb16 --data-root DATA --output SWEEP --ray auto --gpus 0.5[/]
    """
    trials, left_out = options.trials()
    if left_out:
        log(f"Left out: {left_out}.")
    if options.dry_run:
        show_grid(trials, options.output_dir)  # imports no torch
        return
    from dcp_zoo.benchmark.sweep import sweep
    from dcp_zoo.cli import sweeps

    import_extra("pandas", "plots")  # otherwise a missing pandas would only be noticed at the end
    if options.ray and options.threads:
        raise ZooError("--threads applies to trials in this process: with --ray, use --cpus.")
    use_threads(options.threads)
    run, show = sweeps.backend(options.ray, cpus=options.cpus, gpus=options.gpus, retries=options.retries)
    needed = dict.fromkeys(trial.dataset for trial in trials if uses_data_root(trial.dataset))
    missing = ["--output DIR for the results"] * (options.output_dir is None)
    if needed and options.data_root is None and not options.features:
        missing.append(f"--data-root DIR, the folder with {', '.join(needed)}")
    if missing or options.output_dir is None:
        raise ZooError(f"Pass {', and '.join(missing)}.")
    check_output(options.output_dir)
    try:
        failed = sweep(trials, options.settings(), run=run, show=show)
    except KeyboardInterrupt:
        log("Stopped. Finished trials are kept; the same command resumes from there.")
        raise
    sweeps.show_results(trials, options.output_dir, failed)
    if failed:
        raise ZooError(f"{len(failed)} of {len(trials)} trials failed; the same command tries them again.")


def show_grid(trials: "list[Trial]", output_dir: Path | None) -> None:
    """The planned trials, those that are done, and an estimate of the time for the rest."""
    from dcp_zoo.benchmark import estimate, store

    results = store.results(output_dir) if output_dir else {}
    estimator = estimate.TimeEstimator(results.values())
    output.print(*grid_tables(trials, results, estimator))
    todo = [trial for trial in trials if trial.key not in results]
    output.print(f"{len(trials)} trials, {len(todo)} to run. {estimator.describe(todo)}")


def grid_tables(trials: "Sequence[Trial]", results: Collection[str], estimator: "TimeEstimator") -> Iterable[Table]:
    """A table of each model's trials; `results` has the keys of those that are done."""
    from dcp_zoo.benchmark.plan import grid_rows
    from dcp_zoo.files import format_duration

    columns = ("dataset", "method", "shots", "seeds", "trials", "done", "time left")
    tables: dict[str, Table] = {}
    for (model, dataset, method, changes), group in grid_rows(trials):
        table = tables.setdefault(model, Table(*columns, title=f"{trials[0].protocol}, {model}"))
        todo = [trial for trial in group if trial.key not in results]
        shots, seeds = (sorted({getattr(trial, name) for trial in group} - {0}) for name in ("shots", "seed"))
        table.add_row(
            dataset,
            f"{method} {changes}".strip(),
            *(", ".join(map(str, values)) for values in (shots, seeds)),
            *(str(len(group)), str(len(group) - len(todo))),
            format_duration(estimator.total(todo)),
        )
    return tables.values()


def split_commas(values: Iterable[str]) -> list[str]:
    """Split at commas: "a,b" and "c" -> a, b, c."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def numbers(values: Iterable[str], option: str) -> list[int]:
    """Positive integers; ZooError names the option."""
    texts = split_commas(values)
    for text in texts:
        if not text.isdecimal() or int(text) < 1:
            raise ZooError(f"{option} takes positive integers, such as 1,2,4, not {text!r}.")
    return [int(text) for text in texts]


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Output folders of `dcp-zoo benchmark`, or the results.csv in them."),
    ],
    output_dir: Annotated[
        Path | None, typer.Option("--output", help="Folder for the report. Default: `report` in the first folder.")
    ] = None,
) -> None:
    """Write tables and learning curves of benchmark results to `report.md` and `report.html`, a self-contained page.

    [dim]dcp-zoo report SWEEP[/]
    [dim]dcp-zoo report SWEEP OTHER_SWEEP --output REPORT[/]
    """
    folders = [place.parent if place.name == "results.csv" else place for place in folders]
    output_dir = output_dir or folders[0] / "report"
    check_output(output_dir)
    for module in ("pandas", "matplotlib"):
        import_extra(module, "plots")
    from dcp_zoo.benchmark.report import write_report

    for path in write_report(folders, output_dir):
        output.print(f"Wrote {path}")
