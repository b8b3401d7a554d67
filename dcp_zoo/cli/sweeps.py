"""Back ends and terminal output of `dcp-zoo benchmark`."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.ray_backend import sweep_on_ray
from dcp_zoo.benchmark.sweep import Event, run_in_process
from dcp_zoo.benchmark.trial import Trial
from dcp_zoo.cli.console import errors, log, output, progress_bar
from dcp_zoo.cli.live import watch
from dcp_zoo.cluster import Resources, import_ray
from dcp_zoo.errors import ZooError


def backend(ray: str | None, resources: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The arguments `run` and `show` of `sweep`: what runs the trials, and what displays their events."""
    if ray is not None:
        import_ray()  # a missing extra is noticed before anything is written
        on_ray = partial(sweep_on_ray, address=ray, resources=Resources(**resources))
        return on_ray, lambda events, total: watch(show(events, total), total)
    if resources:
        raise ZooError("--cpus, --gpus and --retries apply to Ray: add --ray local, or a cluster's address.")
    return partial(run_in_process, progress=partial(progress_bar, transient=True)), show


def show(events: Iterable[Event], total: int) -> Iterator[Event]:
    """Print a line for every trial that finishes."""
    finished = 0
    for event in events:
        if event.state in ("done", "failed"):
            finished += 1
            color = "green" if event.state == "done" else "red"
            errors.print(f"[{color}]{event.state}[/] {finished}/{total} {event.trial.key} ({event.seconds:.0f} s)")
            log(f"  {event.message}")
        if event.state == "waiting":
            log(f"{event.trial.key}: {event.message}")
        if event.state == "busy":
            log(f"{event.trial.key}: running in another sweep; waiting for its result")
        yield event


def show_results(trials: list[Trial], output_dir: Path, failed: dict[Trial, str]) -> None:
    """Print the protocol's tables of all results in the folder, and write them to its CSV file."""
    if store.done(output_dir):
        from dcp_zoo.benchmark.report import tables
        from dcp_zoo.benchmark.report.write import SECTIONS

        for (model, _), group in tables.with_labels(store.gather(output_dir)).groupby(["model", "weights"]):
            for table in SECTIONS[trials[0].protocol][1](group):
                output.print(_rich(table, model))
        path = store.write_results_csv(output_dir)
        output.print(f"All results: {path}. Figures: dcp-zoo report {output_dir}", highlight=False, soft_wrap=True)
    for trial, message in failed.items():
        errors.print("[red]failed[/]", end=" ")
        log(f"{trial.key}: {message}")


def _rich(table: Any, model: str) -> Table:
    rich_table = Table(*table.header, title=f"{model}: {table.caption}", caption=table.note)
    for row in table.rows:
        rich_table.add_row(*row)
    return rich_table
