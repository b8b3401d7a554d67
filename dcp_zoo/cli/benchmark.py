"""`dcp-zoo benchmark`, `dcp-zoo report` and `dcp-zoo data`."""

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape
from rich.table import Table
from typer import Argument, Exit, Option, Typer, confirm

from dcp_zoo.benchmark import Settings, Trial, plan_trials, store
from dcp_zoo.benchmark.plan import check_data
from dcp_zoo.benchmark.report import tables_of, with_labels, write_report
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import ERROR, errors, log, output, plain_table, progress_bar, resumable
from dcp_zoo.data import DatasetSpec, check
from dcp_zoo.data import download as downloads
from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.files import check_output, check_writable, write_file
from dcp_zoo.tables import split_list
from dcp_zoo.threads import use_threads
from dcp_zoo.training.methods import METHODS

if TYPE_CHECKING:
    from dcp_zoo.benchmark.sweep import Event

GRID = "Grid (comma-separated lists or repeated options)"
several = partial(Option, (), rich_help_panel=GRID)
Ray = Annotated[
    str | None, Option(help="Run in parallel on Ray: a cluster's address, or `local`.", rich_help_panel="Cluster")
]
PerTrial = Annotated[
    str | None,
    Option(
        help="Cores and GPUs of a trial; with gpus=0.5, two share a GPU. Default: a core, and a GPU if there are any.",
        metavar="cpus=N,gpus=N",
        rich_help_panel="Cluster",
    ),
]


def backend(ray: str | None, per_trial: str | None) -> Callable[..., Any]:
    """What runs trials, in this process or on the cluster."""
    from dcp_zoo.benchmark.sweep import import_ray, run_in_process, sweep_on_ray

    if ray is None and per_trial:
        raise ZooError("--per-trial applies to Ray: add --ray local, or a cluster's address.")
    if ray is None:
        return run_in_process
    wrong = f"--per-trial takes cpus=N, gpus=N or both, such as cpus=2,gpus=0.5, not {per_trial}."
    with as_zoo_error(wrong, ValueError):
        parts = [part.split("=") for part in split_commas([per_trial or ""])]
        resources: dict[str, Any] = {name: float(number) for name, number in parts}
    if not resources.keys() <= {"cpus", "gpus"}:
        raise ZooError(wrong)
    import_ray()  # a missing extra is noticed before anything is written
    return partial(sweep_on_ray, address=ray, **resources)


def benchmark(
    protocol: str = Argument(metavar="PROTOCOL", help="few-shot, base-to-new, cross-dataset, domain-shift"),
    output_dir: Path | None = Option(None, "--output", help="Folder for results; finished trials are skipped."),
    models: list[str] = several(help="Models of the zoo. Default: dcp_mini."),
    methods: list[str] = several(help=f"{', '.join(METHODS)}. Default: all that are possible."),
    datasets: list[str] = several(help="Default: the protocol's."),
    targets: list[str] = several(help="Of cross-dataset and domain-shift, those to test on. Default: all."),
    shots: list[str] = several(help="Images per class. Default: the protocol's."),
    seeds: list[str] = several(help="Seeds. Default: the paper's, 1,2,3."),
    changes: list[str] = several(
        "--set", metavar="NAME=VALUE", help="Change a field: depth=3, or depth=1,3 for a grid."
    ),
    data_root: opt.DataRoot = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "float32",
    dry_run: bool = Option(
        False, "--dry-run", help="Show the plan, what is missing, and hours by a measured step; run nothing."
    ),
    ray: Ray = None,
    per_trial: PerTrial = None,
) -> None:
    """Compare few-shot methods under one of four protocols, and gather the results.

    Repeat the command to resume a stopped sweep.

    [dim]dcp-zoo benchmark few-shot --datasets caltech101 --data-root DATA --output SWEEP --dry-run[/]
    [dim]dcp-zoo benchmark base-to-new --methods coop,dcp --datasets caltech101 --data-root DATA --output SWEEP[/]
    [dim]dcp-zoo benchmark few-shot --data-root DATA --output SWEEP --ray auto --per-trial gpus=0.5[/]
    """
    trials = plan_trials(
        protocol,
        split_commas(models) or ["dcp_mini"],
        split_commas(methods),
        split_commas(datasets),
        numbers(shots, "--shots"),
        numbers(seeds, "--seeds"),
        opt.parse_changes(changes),
        split_commas(targets),
    )
    settings = Settings(output_dir or Path(os.devnull), data_root, device, precision, progress=progress_bar)
    done = store.done(settings.output)
    todo = [trial for trial in trials if trial.key not in done]
    if dry_run:
        output.print(grid_table(trials))
        output.print(f"{len(trials)} trials, {len(todo)} to run.")
        show_costs(todo, settings)
        return
    from dcp_zoo.benchmark.sweep import sweep

    use_threads()
    run = backend(ray, per_trial)
    if output_dir is None:
        raise ZooError("Pass --output DIR for the results, or --dry-run.")
    check_writable(output_dir)
    check_data(todo, data_root)
    with resumable():
        failed = sweep(trials, settings, run=run, show=show_event)
    show_results(trials, output_dir)
    check_succeeded(failed, trials)


def show_costs(trials: Sequence[Trial], settings: Settings) -> None:
    """Print what trials take: hours, downloads and disk space; ZooError for data that cannot be read."""
    from dcp_zoo.benchmark.pace import costs

    known = downloads.downloadable()
    names = dict.fromkeys(name for trial in trials for name in (trial.dataset, *trial.targets) if name in known)
    for line in costs(trials, downloads.missing([*names], settings.data_root or Path(os.devnull)), settings):
        output.print(line, soft_wrap=True, markup=False)
    if settings.data_root:
        check_data(trials, settings.data_root)


def show_event(event: "Event", number: int, total: int) -> None:
    """Print what has become of a trial."""
    color = "green" if event.state == "done" else "red"
    errors.print(f"[{color}]{event.state}[/] {number}/{total} {event.trial.key}")
    log(f"  {event.message}")


def show_results(trials: Sequence[Trial], output_dir: Path) -> None:
    """Print the protocol's tables of all results in the folder, and write them to its CSV file."""
    results = store.gather(output_dir)
    if results.empty:
        return
    path = output_dir / "results.csv"
    write_file(path, results.to_csv(index=False), "run the same command again")
    for (model, _), group in with_labels(results).groupby(["model", "weights"]):
        for table in tables_of(group, trials[0].protocol):
            output.print(f"[bold]{model}: {table.caption}[/]", plain_table(table.header, table.rows), sep="\n")
            output.print(table.note, "", sep="\n", style="dim")
    output.print(f"All results: {path}. Tables: dcp-zoo report {output_dir}", soft_wrap=True)


def check_succeeded(failed: Mapping[Trial, str], trials: Sequence[Trial]) -> None:
    """ZooError if trials failed."""
    if failed:
        raise ZooError(f"{len(failed)} of {len(trials)} trials failed; the same command tries them again.")


def grid_table(trials: Sequence[Trial]) -> Table:
    """The numbers of trials, of all shots and seeds, of each protocol, model, dataset and method."""
    rows = [(trial.protocol, trial.model, trial.dataset, f"{trial.method} {trial.changes}") for trial in trials]
    cells = [(*row, str(count)) for row, count in Counter(rows).items()]
    return plain_table(("protocol", "model", "dataset", "method", "trials"), cells)


def split_commas(values: Iterable[str]) -> list[str]:
    """The entries of all values, see `split_list`: "a,b" and "c" -> a, b, c."""
    return [part for value in values for part in split_list(value) if part]


def numbers(values: Iterable[str], option: str) -> list[int]:
    """The integers of an option's values; ZooError for anything else."""
    with as_zoo_error(f"{option} takes integers, such as 1,2,4 ({{}}).", ValueError):
        return [int(text) for text in split_commas(values)]


def report(
    folders: list[Path] = Argument(metavar="FOLDER", help="Folders of `dcp-zoo benchmark`."),
    output_dir: Path | None = Option(None, "--output", help="Folder for the report. Default: in the first one."),
    overwrite: opt.Overwrite = False,
) -> None:
    """Write tables of benchmark results to `report.md` and, for a paper, `report.tex`, with figures beside
    them.

    [dim]dcp-zoo report SWEEP OTHER_SWEEP --output REPORT[/]
    """
    path = (output_dir or folders[0] / "report") / "report.md"
    check_output(path, overwrite)
    files = write_report(folders, path)
    output.print(f"Wrote {', '.join(map(str, files))}", soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        log("For figures: pip install 'dcp_zoo[plots]'.")


data = Typer(help="Download datasets, and check those on disk.", no_args_is_help=True)


@data.command("check", cls=opt.Command)
def check_(
    names: list[str] = Argument(None, metavar="NAME...", help="Only these; also folder."),
    data_root: Path | None = Option(None, exists=True, file_okay=False, help="Folder with the datasets."),
) -> None:
    """Check which datasets are present and complete, and show where to get the others.

    The exit code is 1 if a dataset is broken. Equal split hashes mean the same images in the same parts.

    [dim]dcp-zoo data check --data-root DATA[/]
    [dim]dcp-zoo data check folder --data-root MY_PHOTOS[/]
    """
    if data_root is None and not names:
        raise ZooError("Pass the folder with the datasets (--data-root DIR), or one to check.")
    rows = check(data_root, names or None)
    cells = []
    for row in rows:
        counts = [f"{count:,}" for count in row.counts or ()]
        cells.append((row.name, row.status, *counts, row.sha256[:12]))
    output.print(plain_table(("dataset", "status", "train", "val", "test", "split sha256"), cells))
    for row in rows:
        if row.message:
            output.print(f"{row.name} is {row.status}. {row.message}", markup=False, soft_wrap=True)
        if row.note:
            output.print(row.note, markup=False, soft_wrap=True)
    if any(row.status == "broken" for row in rows):
        raise Exit(1)


@data.command(cls=opt.Command)
def download(
    names: list[str] = Argument(metavar="NAME...", help="Datasets, or `all`."),
    data_root: Path = Option(help="Folder for the datasets; each gets a folder in CoOp's layout."),
    agree: opt.Agree = False,
) -> None:
    """Download datasets, unpack them in CoOp's layout, and check them. CoOp's splits are part of this
    package.

    Complete datasets are skipped; a stopped download of a file with a checksum continues.

    [dim]dcp-zoo data download caltech101 dtd --data-root DATA[/]
    [dim]dcp-zoo data download all --data-root DATA[/]
    """
    chosen = downloads.downloadable() if names == ["all"] else names
    specs = downloads.missing(chosen, data_root)
    failed = download_all(specs, data_root, agree)
    if failed:
        raise ZooError(f"Not complete: {', '.join(failed)}. Repeat the command to resume.")
    output.print(f"All of {', '.join(chosen)} are in {data_root}.", soft_wrap=True)


def download_all(specs: Sequence[DatasetSpec], data_root: Path, agree: bool) -> list[str]:
    """Download datasets, once their terms are agreed to; the names of those that could not be."""
    for spec in specs:
        output.print(f"[bold]{spec.name}[/]: {escape(spec.terms)}\n  {escape(spec.source)}", soft_wrap=True)
    if specs and not agree and not confirm("Do you agree to these terms?"):
        raise ZooError("Nothing was downloaded: read the terms on the pages above, and agree to them.")
    failed = []
    for spec in specs:
        try:
            row = downloads.download_dataset(spec, data_root)
            output.print(f"{spec.name}: complete, split sha256 {row.sha256[:12]}")
        except ZooError as error:  # the others can continue
            failed.append(spec.name)
            log(f"{spec.name}: {error}", ERROR)
    return failed
