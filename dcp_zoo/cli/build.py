"""`dcp-zoo build`."""

import os
import timeit
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from dcp_zoo.cli.benchmark import grid_tables, numbers, on_cluster, several, split_commas
from dcp_zoo.cli.console import log, output
from dcp_zoo.cli.data import download_all
from dcp_zoo.cli.options import Agree, Device, ImagenetFrom, Precision, Workers, check_output, cli_option, takes_options
from dcp_zoo.data import DatasetSpec, list_datasets
from dcp_zoo.errors import ZooError
from dcp_zoo.files import format_duration
from dcp_zoo.threads import use_threads

if TYPE_CHECKING:
    from dcp_zoo.benchmark.estimate import Times
    from dcp_zoo.benchmark.trial import Trial
    from dcp_zoo.release.build import HeadState


@dataclass
class BuildOptions:
    """The options of `dcp-zoo build`."""

    models: list[str] = several("Models of the zoo.", "--models", "--model")
    data_root: Path | None = cli_option(None, "Folder with the datasets; what is missing is downloaded.")
    output: Path | None = cli_option(None, "Folder for the state of the build, which resumes it.")
    org: str | None = cli_option(None, "Organisation or user on the Hub. Default: train and check, publish nothing.")
    datasets: list[str] = several("Default: all 11.")
    shots: list[str] = several("Training images per class. Default: 1,2,4,8,16.")
    seeds: list[str] = several("Seeds. Default: 1,2,3.")
    agree: Agree = False
    imagenet_from: ImagenetFrom = None
    device: Device = "auto"
    precision: Precision = "float32"
    workers: Workers = 0
    step_seconds: float | None = cli_option(
        None, "Seconds per training step, for --dry-run. Default: a few steps are measured."
    )
    dry_run: bool = cli_option(False, "Show the heads, hours, disk space and downloads; start nothing.")
    ray: str | None = on_cluster("Train in parallel on Ray: a cluster's address, or `local`.")
    cpus: float | None = on_cluster("Cores per head. Default: 1.")
    gpus: float | None = on_cluster("GPUs per head. Default: 1 if there are any.")

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
    run, show = sweeps.backend(options.ray, cpus=options.cpus, gpus=options.gpus)
    use_threads(None)
    absent = download_all(missing, options.data_root, options.agree, options.imagenet_from)
    ready = [trial for trial in trials if trial.dataset not in absent]
    settings = Settings(options.output, options.data_root, options.device, options.precision, options.workers)
    building.build_heads(ready, settings, options.org, log=log, run=run, show=show)
    entries = building.manifest_entries(options.output, trials)
    if entries and publish.pin(entries):
        output.print(f"{len(entries)} heads are pinned in {publish.MANIFEST}: commit it.")
    heads = building.states(options.output, trials)
    show_states(heads)
    bad = sum(head.state in ("failed", "refused") for head in heads)
    if bad or absent:
        raise ZooError(
            f"{bad} heads failed or were refused"
            + (f", and {', '.join(absent)} could not be downloaded" if absent else "")
            + ". The same command tries them again."
        )


def show_build_plan(trials: Sequence["Trial"], missing: Sequence[DatasetSpec], options: BuildOptions) -> None:
    """The trials, the states of the heads, and what they cost: time, disk space, downloads."""
    from dcp_zoo.benchmark import estimate, store
    from dcp_zoo.cli.size import head_bytes
    from dcp_zoo.release.build import states
    from dcp_zoo.training.recipes import default_recipe
    from dcp_zoo.zoo.models import get_spec

    folder = options.output or Path(os.devnull)
    heads, results = states(folder, trials), store.results(folder)
    models, given = dict.fromkeys(trial.model for trial in trials), options.step_seconds
    times: dict[str, Times] = {}
    if given is not None:
        times = dict.fromkeys(models, ([1], [given]))
        source = f"at most, if a step takes {given:g} s: that is your number, nothing was measured"
    elif results:
        source = "estimated from finished trials of this build"
    else:
        times = {model: measured_steps(model, options.device) for model in models}
        source = "estimated from a few steps on this machine; for another one pass --step-seconds"
    estimator = estimate.TimeEstimator(() if times else results.values(), times)
    output.print(*grid_tables(trials, results, estimator))
    show_states(heads)
    total = estimator.total([trial for trial in trials if trial.key not in results])
    size = sum(head_bytes(get_spec(head.trial.model), default_recipe(head.trial.model).config) for head in heads)
    lines = (
        f"Time: {format_duration(total)} in sequence, {source}.",
        f"Disk: {size / 1e9:.2f} GB for {len(heads)} head{'s' * (len(heads) != 1)}, besides the datasets.",
        "Downloads: " + _downloads(missing),
    )
    output.print("\n".join(lines), soft_wrap=True)


def measured_steps(model: str, device: str) -> "Times":
    """Numbers of classes, and seconds of a step of DCP on 4 images; for 1,000 on the line through the others."""
    import torch

    from dcp_zoo.training.device import pick_device
    from dcp_zoo.zoo.factory import create_model

    log(f"Measuring a few steps of {model}")
    dcp = create_model(model, False, classnames=["cat"]).to(pick_device(device))
    images = torch.rand(4, *dcp.pretrained_cfg["input_size"], device=dcp.device)

    def step() -> None:
        loss = dcp(images).square().mean()
        loss.backward()
        loss.item()  # waits for the device

    def seconds(classes: int) -> float:
        dcp.set_classnames([f"class {i}" for i in range(classes)])
        return min(timeit.repeat(step, repeat=3, number=1))  # the first one is slower

    few, many = seconds(10), seconds(100)
    return [10, 100, 1000], [few, many, many + 10 * max(0.0, many - few)]


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
    output.print(", ".join(f"{count} {state}" for state, count in counts.items()) + ".")
    for head in heads:
        if head.state in ("failed", "refused"):
            output.print(f"[red]{head.state}[/] {head.name}: {escape(head.note)}", soft_wrap=True)
