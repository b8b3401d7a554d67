"""Where the trials of `dcp-zoo benchmark` run, and what there is to see of them."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from dcp_zoo.benchmark import estimate, store
from dcp_zoo.benchmark.plan import grid_rows
from dcp_zoo.benchmark.ray_backend import Resources, run_on_ray
from dcp_zoo.benchmark.sweep import Event, Trial, run_in_process
from dcp_zoo.cli.console import errors, log, output, progress_bar
from dcp_zoo.cli.live import watch
from dcp_zoo.errors import ZooError


def backend(ray: str | None, resources: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What runs the trials, and what shows their events: `run` and `show` of `sweep`."""
    if ray is not None:
        on_ray = partial(run_on_ray, address=ray, resources=Resources(**resources))
        return on_ray, lambda events, total: watch(show(events, total), total)
    if resources:
        raise ZooError("--cpus, --gpus and --retries are for trials side by side: add --ray local, or an address.")
    return partial(run_in_process, progress=partial(progress_bar, transient=True)), show


def show_plan(trials: list[Trial], output_dir: Path) -> None:
    """What would be run, what is done, and an estimate of the time that the rest takes."""
    known = store.results(output_dir)
    clock = estimate.Clock(known.values())
    columns = ("dataset", "method", "shots", "seeds", "trials", "done", "time left")
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
            log(f"  {event.message}")
        if event.state == "waiting":
            log(f"{event.trial.key}: {event.message}")
        if event.state == "busy":
            log(f"{event.trial.key}: another sweep works on it; its result is awaited")
        yield event


def show_results(trials: list[Trial], output_dir: Path, failed: dict[Trial, str]) -> None:
    """The protocol's tables of all that is in the folder, and where it was gathered."""
    if store.done(output_dir):
        from dcp_zoo.report import tables
        from dcp_zoo.report.write import SECTIONS

        for (model, _), group in tables.labelled(store.gather(output_dir)).groupby(["model", "weights"]):
            for found in SECTIONS[trials[0].protocol][1](group):
                output.print(_rich(found, model))
        path = store.write_csv(output_dir)
        output.print(f"All results: {path}. Figures: dcp-zoo report {output_dir}", highlight=False, soft_wrap=True)
    for trial, message in failed.items():
        errors.print("[red]failed[/]", end=" ")
        log(f"{trial.key}: {message}")


def _rich(found: Any, model: str) -> Table:
    table = Table(*found.header, title=f"{model}: {found.caption}", caption=found.note)
    for row in found.rows:
        table.add_row(*row)
    return table
