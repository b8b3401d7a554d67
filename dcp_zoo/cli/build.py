"""`dcp-zoo build`."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dcp_zoo.cli.benchmark import numbers, on_cluster, several, split_commas
from dcp_zoo.cli.console import log, output
from dcp_zoo.cli.data import agree_to_terms
from dcp_zoo.cli.options import Device, Precision, Workers, check_output, takes_options
from dcp_zoo.data import DatasetSpec, list_datasets
from dcp_zoo.errors import ZooError
from dcp_zoo.threads import use_threads

if TYPE_CHECKING:
    from dcp_zoo.benchmark.estimate import Speed, TimeEstimator
    from dcp_zoo.benchmark.trial import Trial
    from dcp_zoo.release.build import HeadState


@dataclass
class BuildOptions:
    """The options of `dcp-zoo build`."""

    models: Annotated[list[str], several("Models of the zoo.", "--models", "--model")] = field(default_factory=list)
    data_root: Annotated[Path | None, typer.Option(help="Folder with the datasets; what is missing is downloaded.")] = (
        None
    )
    output: Annotated[Path | None, typer.Option(help="Folder for the state of the build, which resumes it.")] = None
    org: Annotated[
        str | None, typer.Option(help="Organisation or user on the Hub. Default: train and check, publish nothing.")
    ] = None
    datasets: Annotated[list[str], several("Default: all 11.")] = field(default_factory=list)
    shots: Annotated[list[str], several("Training images per class.")] = field(default_factory=lambda: ["1,2,4,8,16"])
    seeds: Annotated[list[str], several("Seeds.")] = field(default_factory=lambda: ["1,2,3"])
    agree: Annotated[bool, typer.Option("--agree", help="Agree to the datasets' terms without being asked.")] = False
    imagenet_from: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|hf", help="Folder with ImageNet's three archives, or its gated Hub dataset."),
    ] = None
    device: Device = "auto"
    precision: Precision = "float32"
    workers: Workers = 0
    price: Annotated[float | None, typer.Option(help="Of one hour of the machine, for --dry-run.")] = None
    step_seconds: Annotated[
        float | None, typer.Option(help="Of one training step, for --dry-run. Default: a few are measured.")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the heads, hours, disk space and downloads; start nothing.")
    ] = False
    ray: Annotated[str | None, on_cluster("Train in parallel on Ray: a cluster's address, or `local`.")] = None
    cpus: Annotated[float | None, on_cluster("Cores per head. Default: 1.")] = None
    gpus: Annotated[float | None, on_cluster("GPUs per head. Default: 1 if there are any.")] = None

    def check(self) -> None:
        """ZooError for all options that are missing; --dry-run needs no folders."""
        needed: dict[str, object] = {"--models MODEL": self.models}
        if not self.dry_run:
            needed |= {"--data-root DIR": self.data_root, "--output DIR": self.output}
        if missing := [option for option, value in needed.items() if not value]:
            raise ZooError(f"Pass {', '.join(missing)}: dcp-zoo build {' '.join(needed)}")


@takes_options
def build(options: BuildOptions) -> None:
    """Fill the zoo: download the datasets, train the heads, check them, publish those that pass, and pin them.

    The same command resumes a build that was stopped; heads that are published are left alone.

    [dim]dcp-zoo build --models dcp_vitb16 --data-root DATA --output BUILD --dry-run[/]
    [dim]dcp-zoo build --models dcp_vitb16 --data-root DATA --output BUILD --org MY_ORG --ray auto --gpus 0.5[/]
    """
    options.check()
    names = split_commas(options.datasets) or list_datasets()
    from dcp_zoo.benchmark import Settings
    from dcp_zoo.cli import sweeps
    from dcp_zoo.data import download as downloads
    from dcp_zoo.release import build as building
    from dcp_zoo.release import publish

    numbered = numbers(options.shots, "--shots"), numbers(options.seeds, "--seeds")
    trials = building.plan_heads(split_commas(options.models), names, *numbered)
    missing = downloads.missing(names, options.data_root or Path(os.devnull))
    if options.dry_run:
        show_build_plan(trials, missing, options)
        return
    assert options.data_root
    assert options.output
    check_output(options.output)
    agree_to_terms(missing, options.data_root, options.agree)
    run, show = sweeps.backend(options.ray, cpus=options.cpus, gpus=options.gpus)
    use_threads(None)
    absent = download_all(missing, options.data_root, options.imagenet_from)
    ready = [trial for trial in trials if trial.dataset not in absent]
    settings = Settings(options.output, options.data_root, options.device, options.precision, options.workers)
    building.build_heads(ready, settings, options.org, log=log, run=run, show=show)
    entries = building.manifest_entries(options.output, trials)
    if entries and publish.pin(entries):
        output.print(f"{len(entries)} heads are pinned in {publish.MANIFEST}: commit it.", highlight=False)
    heads = building.states(options.output, trials)
    show_states(heads)
    bad = sum(head.state in ("failed", "refused") for head in heads)
    if bad or absent:
        raise ZooError(
            f"{bad} heads failed or were refused"
            + (f", and {', '.join(absent)} could not be downloaded" if absent else "")
            + ". The same command tries them again."
        )


def download_all(specs: Sequence[DatasetSpec], data_root: Path, imagenet_from: str | None) -> list[str]:
    """Download datasets; the names of those that could not be."""
    from dcp_zoo.data import download as downloads

    absent = []
    for spec in specs:
        try:
            downloads.download_dataset(spec, data_root, imagenet_from)
        except ZooError as error:  # heads of the others can be trained
            absent.append(spec.name)
            log(f"{spec.name}: {error}")
    return absent


def show_build_plan(trials: Sequence["Trial"], missing: Sequence[DatasetSpec], options: BuildOptions) -> None:
    """The heads by dataset and state, and what they cost: hours, money, disk space, downloads."""
    from dcp_zoo.benchmark.estimate import format_duration
    from dcp_zoo.benchmark.store import done
    from dcp_zoo.cli.size import head_bytes
    from dcp_zoo.release.build import states
    from dcp_zoo.training.recipes import default_recipe
    from dcp_zoo.zoo.models import get_spec

    folder = options.output or Path(os.devnull)
    heads, finished = states(folder, trials), done(folder)
    todo, (estimator, source) = [trial for trial in trials if trial.key not in finished], _estimator(trials, options)
    table = Table("dataset", "images", "heads", "published", "to train", "hours")
    for name in dict.fromkeys(trial.dataset for trial in trials):
        own = [head for head in heads if head.trial.dataset == name]
        seconds = estimator.total([trial for trial in todo if trial.dataset == name])
        hours = "?" if seconds is None else f"{seconds / 3600:.1f}"
        state = "to download" if name in [spec.name for spec in missing] else "here"
        counts = Counter(head.state for head in own)
        to_train = counts["planned"] + counts["failed"]
        table.add_row(name, state, *map(str, (len(own), counts["published"], to_train)), hours)
    output.print(table)
    total = estimator.total(todo)
    size = sum(head_bytes(get_spec(head.trial.model), default_recipe(head.trial.model).config) for head in heads)
    lines = [
        f"Time: {format_duration(total)} in sequence, {source}.",
        f"Disk: {size / 1e9:.2f} GB for {len(heads)} head{'s' * (len(heads) != 1)}, besides the datasets.",
        "Downloads: " + _downloads(missing),
    ]
    if options.price is not None and total is not None:
        lines.insert(1, f"Money: {options.price * total / 3600:,.2f} at {options.price:g} per hour.")
    output.print("\n".join(lines), highlight=False, soft_wrap=True)


def _estimator(trials: Sequence["Trial"], options: BuildOptions) -> tuple["TimeEstimator", str]:
    """What estimates the time of trials, and in words what it relies on."""
    from dcp_zoo.benchmark import estimate, store

    if (given := options.step_seconds) is not None:
        source = f"at most, if a step takes {given:g} s: that is your number, nothing was measured"
        return estimate.TimeEstimator([], estimate.given_speed(given).seconds), source
    results = store.results(options.output).values() if options.output else ()
    if results:
        return estimate.TimeEstimator(results), "estimated from finished trials of this build"
    speeds = {model: measured_here(model, options.device) for model in {trial.model for trial in trials}}
    source = "estimated from a few steps on this machine; for another one pass --step-seconds"
    return estimate.TimeEstimator((), lambda trial: speeds[trial.model].seconds(trial)), source


def measured_here(model: str, device: str) -> "Speed":
    """The times of a step and of a test batch of DCP with random weights, for 10 and 100 classes; for 1,000 on the line
    through them."""
    import torch

    from dcp_zoo.benchmark.estimate import Speed
    from dcp_zoo.training.device import pick_device
    from dcp_zoo.zoo.factory import create_model

    log(f"Measuring a few steps of {model}")
    dcp = create_model(model, False, classnames=["cat"]).to(pick_device(device))
    images = torch.rand(16, *dcp.pretrained_cfg["input_size"], device=dcp.device)

    def seconds(work: Callable[[], Any]) -> float:
        work()  # the first one is slower
        started = time.perf_counter()
        for _ in range(2):
            float(work())  # waits for the device
        return (time.perf_counter() - started) / 2

    def step() -> Any:
        loss = dcp(images[:4]).square().mean()
        loss.backward()
        return loss

    steps, batches = [], []
    for classes in (sizes := [10, 100]):
        dcp.set_classnames([f"class {i}" for i in range(classes)])
        steps.append(seconds(step))
        with torch.no_grad():
            batches.append(seconds(lambda: dcp(images).sum()))
    for times in (steps, batches):
        times.append(times[1] + 10 * max(0.0, times[1] - times[0]))
    sizes = [*sizes, 1000]
    return Speed((sizes, steps), (sizes, batches))


def _downloads(missing: Sequence[DatasetSpec]) -> str:
    from dcp_zoo.data.download import gigabytes

    if not missing:
        return "none, all datasets are here."
    known = gigabytes(missing)
    size = "an unknown size, as a source does not answer" if known is None else f"{known:.1f} GB"
    by_hand = "; imagenet needs a login, see --imagenet-from" if any(s.name == "imagenet" for s in missing) else ""
    return f"{', '.join(spec.name for spec in missing)}, {size}{by_hand}."


def show_states(heads: Sequence["HeadState"]) -> None:
    """How many heads are in each state, and the reasons of those that are not published."""
    counts = Counter(head.state for head in heads)
    output.print(", ".join(f"{count} {state}" for state, count in counts.items()) + ".", highlight=False)
    for head in heads:
        if head.state in ("failed", "refused"):
            output.print(f"[red]{head.state}[/] {head.name}: {escape(head.note)}", highlight=False, soft_wrap=True)
