"""Back ends and terminal output of sweeps: `dcp-zoo benchmark` and `dcp-zoo build`."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import Trial
from dcp_zoo.benchmark.sweep import run_in_process, sweep_on_ray
from dcp_zoo.cli.console import errors, log, output, progress_bar
from dcp_zoo.cluster import Event, Resources, import_ray
from dcp_zoo.errors import ZooError

FINISHED = ("done", "failed")


def backend(ray: str | None, **resources: float | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The arguments `run` and `show` of `sweep`: what runs the trials, in this process or on the cluster at the address
    `ray`, and what displays their events."""
    given: dict[str, Any] = {name: value for name, value in resources.items() if value is not None}
    if ray is not None:
        import_ray()  # a missing extra is noticed before anything is written
        return partial(sweep_on_ray, address=ray, resources=Resources(**given)), show_with_bar
    if given:
        raise ZooError("--cpus, --gpus and --retries apply to Ray: add --ray local, or a cluster's address.")
    return partial(run_in_process, progress=partial(progress_bar, transient=True)), show_events


def show_events(events: Iterable[Event], total: int) -> Iterator[Event]:
    """Print a line for every trial that finishes."""
    finished = 0
    for event in events:
        if event.state in FINISHED:
            finished += 1
            color = "green" if event.state == "done" else "red"
            errors.print(f"[{color}]{event.state}[/] {finished}/{total} {event.item.key} ({event.seconds:.0f} s)")
            log(f"  {event.message}")
        if event.state == "waiting":
            log(f"{event.item.key}: {event.message}")
        if event.state == "busy":
            log(f"{event.item.key}: running in another sweep; waiting for its result")
        yield event


def show_with_bar(events: Iterable[Event], total: int) -> Iterator[Event]:
    """`show_events` above a bar of the trials that have finished, where several run at the same time."""
    shown = show_events(events, total)
    return progress_bar(shown, "trials", total, transient=True, size=lambda event: event.state in FINISHED)


def show_results(trials: list[Trial], output_dir: Path, failed: dict[Trial, str]) -> None:
    """Print the protocol's tables of all results in the folder, and write them to its CSV file."""
    if store.done(output_dir):
        from dcp_zoo.benchmark.report.tables import with_labels
        from dcp_zoo.benchmark.report.write import SECTIONS

        for (model, _), group in with_labels(store.gather(output_dir)).groupby(["model", "weights"]):
            for table in SECTIONS[trials[0].protocol][1](group):
                rich_table = Table(*table.header, title=f"{model}: {table.caption}", caption=table.note)
                for row in table.rows:
                    rich_table.add_row(*row)
                output.print(rich_table)
        path = store.write_results_csv(output_dir)
        output.print(f"All results: {path}. Figures: dcp-zoo report {output_dir}", soft_wrap=True)
    for trial, message in failed.items():
        errors.print("[red]failed[/]", end=" ")
        log(f"{trial.key}: {message}")
