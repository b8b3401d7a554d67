"""`dcp-zoo benchmark`."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dcp_zoo.benchmark import estimate, store
from dcp_zoo.benchmark.plan import PROTOCOLS, grid_rows, plan_trials
from dcp_zoo.benchmark.ray_backend import Resources, run_on_ray
from dcp_zoo.benchmark.sweep import Event, Settings, Trial, run_in_process, sweep
from dcp_zoo.cli.console import errors, output, progress_bar, say
from dcp_zoo.cli.live import watch
from dcp_zoo.cli.options import DataRoot, Device, Precision, Workers
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.methods import METHODS

GRID = "What to run: lists with commas, or the option again"
RAY = "On a cluster"


def several(help: str, *names: str) -> Any:
    """An option that takes several values."""
    return typer.Option(*names, help=help, rich_help_panel=GRID)


def benchmark(
    protocol: Annotated[str, typer.Argument(help=", ".join(PROTOCOLS), metavar="PROTOCOL")],
    output_dir: Annotated[Path, typer.Option("--output", help="Folder for results; what is in it is not run again.")],
    models: Annotated[list[str], several("Models of the zoo.")] = ["dcp_mini"],  # noqa: B006
    methods: Annotated[list[str], several(f"{', '.join(METHODS)}. Default: all that the protocol allows.")] = [],  # noqa: B006
    datasets: Annotated[
        list[str], several("Data sets to train on. Default: the 11; imagenet for cross-dataset and domain-shift.")
    ] = [],  # noqa: B006
    shots: Annotated[list[str], several("Training images a class. Default: 1,2,4,8,16 for few-shot, else 16.")] = [],  # noqa: B006
    seeds: Annotated[list[str], several("Seeds; the paper's are 1,2,3.")] = ["1,2,3"],  # noqa: B006
    changes: Annotated[
        list[str], several("Change a part of the recipes that have it: depth=3, or depth=1,3,5 for a grid.", "--set")
    ] = [],  # noqa: B006
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and how long it may take.")] = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="Keep the accuracy of every class.")] = False,
    confusion: Annotated[bool, typer.Option("--confusion", help="Keep which class is taken for which.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Run side by side on Ray: a cluster's address, or `local`.", rich_help_panel=RAY),
    ] = None,
    cpus: Annotated[float, typer.Option(help="Cores for one trial.", rich_help_panel=RAY)] = Resources.cpus,
    gpus: Annotated[
        float | None,
        typer.Option(help="GPUs for one trial; 0.5: two share one. Default: 1 if there are any.", rich_help_panel=RAY),
    ] = Resources.gpus,
    retries: Annotated[
        int, typer.Option(min=0, help="New attempts after a worker died.", rich_help_panel=RAY)
    ] = Resources.retries,
) -> None:
    """Run one of the paper's protocols for DCP and for what it is compared with, and gather the results.

    A sweep that was stopped goes on when the same command is given again; several may share a folder.

    [dim]dcp-zoo benchmark few-shot --datasets caltech101 --data-root DATA --output SWEEP --dry-run[/]
    [dim]dcp-zoo benchmark few-shot --methods zero-shot,dcp --datasets caltech101,dtd --shots 1,16 --data-root DATA
    --output SWEEP[/]
    [dim]dcp-zoo benchmark base-to-new --methods coop --methods dcp --datasets caltech101 --data-root DATA
    --output SWEEP[/]
    [dim]dcp-zoo benchmark domain-shift --datasets pacs_photo --data-root DATA --output SWEEP[/]
    [dim]dcp-zoo benchmark few-shot --methods dcp --shots 4 --datasets caltech101 --set depth=1,3,5 --set
    coupling=text_to_vision --data-root DATA --output ABLATION[/]
    [dim]dcp-zoo benchmark few-shot --models dcp_vitb16 --data-root DATA --output SWEEP --ray auto --gpus 0.5[/]
    """
    trials = plan_trials(
        protocol,
        split_commas(models),
        split_commas(methods),
        split_commas(datasets),
        [number(value, "--shots") for value in split_commas(shots)],
        [number(value, "--seeds") for value in split_commas(seeds)],
        dict(parse_change(change) for change in changes),
    )
    settings = Settings(output_dir, data_root, device, precision, workers, per_class, confusion)
    if dry_run:
        show_plan(trials, output_dir)
        return
    import_extra("pandas", "report")  # missing, it would be missed only when all is done
    run, shown = runner(ray, Resources(cpus, gpus, retries))
    try:
        failed = sweep(trials, settings, run=run, show=shown)
    except KeyboardInterrupt:
        say("Stopped. What is finished is kept; the same command goes on from there.")
        raise
    show_results(trials, output_dir, failed)
    if failed:
        raise ZooError(f"{len(failed)} of {len(trials)} trials failed; the same command tries them again.")


def runner(ray: str | None, resources: Resources) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Where trials run, and what there is to see of it."""
    if ray is not None:
        on_ray = partial(run_on_ray, address=ray, resources=resources)
        return on_ray, lambda events, total: watch(show(events, total), total)
    if resources != Resources():
        raise ZooError("--cpus, --gpus and --retries are for trials side by side: add --ray local, or an address.")
    return partial(run_in_process, progress=partial(progress_bar, transient=True), say=str), show


# ------------------------------------------------------------------------------------------------------------- options


def split_commas(values: Iterable[str]) -> list[str]:
    """ "a,b" and "c" -> a, b, c"""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def number(text: str, option: str) -> int:
    """A whole number above 0; ZooError names the option."""
    if not text.isdecimal() or int(text) < 1:
        raise ZooError(f"{option} takes whole numbers from 1, such as 1,2,4; not {text!r}.")
    return int(text)


def parse_change(text: str) -> tuple[str, list[Any]]:
    """ "depth=1,3" -> "depth", [1, 3]; what is not JSON is a string."""
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise ZooError(f"--set takes NAME=VALUE, such as depth=3 or depth=1,3,5; not {text!r}.")
    return name, [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# ---------------------------------------------------------------------------------------------------------------- show


def show_plan(trials: list[Trial], output_dir: Path) -> None:
    """What would be run, what is done, and an estimate of the time that the rest takes."""
    known = store.results(output_dir)
    clock = estimate.Clock(known.values())
    columns = ("data set", "method", "shots", "seeds", "trials", "done", "time left")
    tables: dict[str, Table] = {}
    for (model, dataset, method, changes), group in grid_rows(trials):
        table = tables.setdefault(model, Table(*columns, title=f"{trials[0].protocol}, {model}"))
        todo = [trial for trial in group if trial.key not in known]
        table.add_row(
            dataset,
            f"{method} {changes}".strip(),
            *(_numbers(trial.shots for trial in group), _numbers(trial.seed for trial in group)),
            *(str(len(group)), str(len(group) - len(todo))),
            estimate.in_words(clock.total(todo)),
        )
    output.print(*tables.values())
    todo = [trial for trial in trials if trial.key not in known]
    output.print(f"{len(trials)} trials, {len(todo)} to run. {clock.explain(todo)}", highlight=False)


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(set(values) - {0}))


def show(events: Iterable[Event], total: int) -> Iterator[Event]:
    """A line for every trial that ends."""
    over = 0
    for event in events:
        if event.state in ("done", "failed"):
            over += 1
            color = "green" if event.state == "done" else "red"
            errors.print(f"[{color}]{event.state}[/] {over}/{total} {event.trial.key} ({event.seconds:.0f} s)")
            say(f"  {escape(event.message)}")
        if event.state == "waiting":
            say(f"{event.trial.key}: {escape(event.message)}")
        if event.state == "busy":
            say(f"{event.trial.key}: another sweep works on it; its result is awaited")
        yield event


def show_results(trials: list[Trial], output_dir: Path, failed: dict[Trial, str]) -> None:
    """The protocol's tables of all that is in the folder, and where it was gathered."""
    if store.done(output_dir):
        from dcp_zoo.report import tables
        from dcp_zoo.report.write import PROTOCOLS as REPORTED

        for (model, _), group in tables.labelled(store.gather(output_dir)).groupby(["model", "weights"]):
            for found in REPORTED[trials[0].protocol][1](group):
                output.print(_rich(found, model))
        path = store.write_csv(output_dir)
        output.print(f"All results: {path}. Figures: dcp-zoo report {output_dir}", highlight=False, soft_wrap=True)
    for trial, message in failed.items():
        say(f"[red]failed[/] {trial.key}: {escape(message)}")


def _rich(found: Any, model: str) -> Table:
    table = Table(*found.header, title=f"{model}: {found.caption}", caption=found.note)
    for row in found.rows:
        table.add_row(*row)
    return table
