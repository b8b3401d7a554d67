"""`dcp-zoo build`, `dcp-zoo publish`, `dcp-zoo verify` and `dcp-zoo submit`: heads and results that others see."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from typer import Argument, Exit, Option

from dcp_zoo.benchmark import Settings, Trial, estimate, plan_trials, store
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.benchmark import ClusterOptions, grid_tables, measured_costs, numbers, several, split_commas
from dcp_zoo.cli.console import log, output, plain_table, print_error, progress_bar
from dcp_zoo.cli.data import download_all
from dcp_zoo.data import DatasetSpec, list_datasets
from dcp_zoo.data import download as downloads
from dcp_zoo.errors import ZooError
from dcp_zoo.files import check_writable, format_duration
from dcp_zoo.threads import use_threads
from dcp_zoo.zoo.registry import get_spec, list_heads

if TYPE_CHECKING:
    from dcp_zoo.release.build import HeadState


@dataclass
class BuildOptions:
    models: list[str] = several("model", "Models of the zoo.", "--models")
    data_root: Path | None = opt.option(None, "Folder with the datasets; what is missing is downloaded.")
    output: Path | None = opt.option(None, "Folder for the state of the build, from which it resumes.")
    org: str | None = opt.option(None, "Organisation or user on the Hub. Default: train and check, publish nothing.")
    datasets: list[str] = several("dataset", "Default: all 11.", "--datasets")
    shots: list[str] = several("shots", "Training images per class. Default: 1,2,4,8,16.")
    seeds: list[str] = several("seed", "Seeds. Default: 1,2,3.", "--seeds")
    agree: opt.Agree = False
    imagenet_from: opt.ImagenetFrom = None
    device: opt.Device = "auto"
    precision: opt.Precision = "float32"
    workers: opt.Workers = 0
    step_seconds: float | None = opt.option(None, "Seconds per training step, for --dry-run. Default: measured.")
    dry_run: bool = opt.option(False, "Show the heads, hours, disk space and downloads; start nothing.")

    def check(self) -> None:
        """ZooError for all options that are missing; --dry-run needs no folders."""
        needed: dict[str, object] = {"--model MODEL": self.models}
        if not self.dry_run:
            needed |= {"--data-root DIR": self.data_root, "--output DIR": self.output}
        if missing := [option for option, value in needed.items() if not value]:
            raise ZooError(f"Pass {', '.join(missing)}: dcp-zoo build {' '.join(needed)}")


@opt.takes_options
def build(options: BuildOptions, cluster: ClusterOptions) -> None:
    """Fill the zoo: download the datasets, train the heads, check them, publish those that pass, and pin them.

    Repeat the command to resume a stopped build; heads that are already published are left alone.

    [dim]dcp-zoo build --models dcp_vitb16 --data-root DATA --output BUILD --dry-run[/]
    [dim]dcp-zoo build --models dcp_vitb16 --data-root DATA --output BUILD --org MY_ORG --ray auto --gpus 0.5[/]
    """
    options.check()
    names = split_commas(options.datasets) or list_datasets()
    from dcp_zoo.release import build as building
    from dcp_zoo.release import publish

    numbered = numbers(options.shots, "--shots"), numbers(options.seeds, "--seed")
    methods = [building.METHOD, building.BASELINE]
    trials = plan_trials("few-shot", split_commas(options.models), methods, names, *numbered)
    missing = downloads.missing(names, options.data_root or Path(os.devnull))
    if options.dry_run:
        show_build_plan(trials, missing, options)
        return
    assert options.data_root
    assert options.output
    check_writable(options.output)
    run, show = cluster.backend()
    use_threads(None)
    absent = download_all(missing, options.data_root, options.agree, options.imagenet_from)
    ready = [trial for trial in trials if trial.dataset not in absent]
    settings = Settings(options.output, options.data_root, options.device, options.precision, options.workers)
    building.build_heads(ready, settings, options.org, log=log, run=run, show=show)
    heads = building.states(options.output, trials)
    entries = {head.name: head.entry for head in heads if head.entry}
    if entries and publish.pin(entries):
        output.print(f"{len(entries)} heads are pinned in {publish.MANIFEST}: commit it.")
    show_states(heads)
    bad = sum(head.state in ("failed", "refused") for head in heads)
    if bad or absent:
        others = f", and {', '.join(absent)} could not be downloaded" if absent else ""
        raise ZooError(f"{bad} heads failed or were refused{others}. Repeat the command to try them again.")


def show_build_plan(trials: Sequence[Trial], missing: Sequence[DatasetSpec], options: BuildOptions) -> None:
    from dcp_zoo.release.build import states

    folder = options.output or Path(os.devnull)
    heads, results = states(folder, trials), store.results(folder)
    if (given := options.step_seconds) is not None:
        # an image without backward pass is a quarter of one of the four of a step
        costs = dict.fromkeys(((t.model, t.method) for t in trials), estimate.Cost(0, 0, (given, given), given / 4))
        source = f"at most, if a step takes {given:g} s: that is your number, nothing was measured"
    elif results:
        costs, source = {}, "estimated from finished trials of this build"
    else:
        costs = measured_costs(trials, (), options.device)
        source = "estimated from short runs on this machine; for another one pass --step-seconds"
    estimator = estimate.TimeEstimator(() if costs else results.values(), costs)
    output.print(*grid_tables(trials, results, estimator))
    show_states(heads)
    total = estimator.total([trial for trial in trials if trial.key not in results])
    size, known = sum(get_spec(head.trial.model).head_mb for head in heads), downloads.gigabytes(missing)
    needed = f"{', '.join(spec.name for spec in missing)}, {'an unknown size' if known is None else f'{known:.1f} GB'}"
    output.print(
        f"Time: {format_duration(total)} in sequence, {source}.\n"
        f"Disk: {size / 1e3:.2f} GB for {len(heads)} {'head' if len(heads) == 1 else 'heads'}, besides the datasets.\n"
        f"Downloads: {needed if missing else 'none, all datasets are here'}.",
        soft_wrap=True,
    )


def show_states(heads: Sequence["HeadState"]) -> None:
    """How many heads are in each state, and the reasons of those that are not published."""
    counts = Counter(head.state for head in heads)
    output.print(", ".join(f"{count} {state}" for state, count in counts.items()) + ".")
    for head in heads:
        if head.state in ("failed", "refused"):
            output.print(f"[red]{head.state}[/] {head.name}: {escape(head.note)}", soft_wrap=True)


def publish(
    folder: Path = Argument(metavar="FOLDER", help="Checkpoint folder of one of the zoo's heads, written by training."),
    org: str = Option(help="Organisation or user on the Hub."),
    license: str = Option("apache-2.0", help="Licence of the trained weights."),
    dry_run: bool = Option(False, "--dry-run", help="Check the folder and show the card; upload nothing."),
) -> None:
    """Check a trained head, write its model card, upload it to the Hub, and pin it in the manifest.

    [dim]dcp-zoo publish dcp_vitb16.imagenet-16shot --org MY_ORG --dry-run[/]

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from dcp_zoo.release import publish as publishing

    release = publishing.prepare(folder, org, license)
    if dry_run:
        print(release.card.content)
        log(f"The checkpoint is valid. It would be uploaded to {release.repo_id}; nothing was sent.")
        return
    revision = publishing.publish(release)
    output.print(f"Published as {release.repo_id} at {revision}.")
    entries = {release.head.name: release.entry(revision)}
    if publishing.pin(entries):
        output.print(f"Pinned in {publishing.MANIFEST}: commit it.")
    else:
        text = json.dumps(entries, indent=1)
        output.print(f"To pin it, add this to dcp_zoo/zoo/heads.json in a source checkout:\n{text}")


def verify(
    head: str | None = Option(None, help="A head, a checkpoint folder, or hf-hub:ORG/REPO."),
    data_root: opt.DataRoot = None,
    all_: bool = Option(False, "--all", help="Verify all heads inside this package."),
    device: opt.Device = "auto",
    workers: opt.Workers = 0,
) -> None:
    """Measure a head again on the test images of its dataset, and compare the result with its card's claim.

    The exit code is 1 if they differ by more than 0.05 percentage points, or a head of --all cannot be measured.

    [dim]dcp-zoo verify --head dcp_mini.caltech101-16shot --data-root DATA[/]
    [dim]dcp-zoo verify --all --data-root DATA[/]
    """
    if (head is None) != all_:
        raise ZooError("Pass one --head, or --all for those inside this package.")
    names = [opt.head_name(head)] if head else list_heads(status="bundled")
    from dcp_zoo.release import publish as publishing

    claims, failed = [], False
    for name in names:
        try:
            claims += publishing.verify(name, data_root, device=device, workers=workers, progress=progress_bar)
        except ZooError as error:
            if head:
                raise
            failed = True  # the others can be measured all the same
            print_error(f"{name}: {error}")
    rows = [
        (c.head, c.coupling, c.stats, f"{c.claimed:.2f}", f"{c.measured:.2f}", "holds" if c.holds else "differs")
        for c in claims
    ]
    output.print(plain_table(("head", "coupling", "stats", "claimed", "measured", ""), rows))
    if failed or not all(claim.holds for claim in claims):
        raise Exit(1)


def submit(
    folder: Path = Argument(metavar="FOLDER", help="Folder with submission.yaml, and the head if there is one."),
    data_root: opt.DataRoot = None,
    device: opt.Device = "auto",
    workers: opt.Workers = 0,
) -> None:
    """Check a leaderboard submission against the rules, measure its head, and print the row to add.

    [dim]dcp-zoo submit MY_RESULT --data-root DATA[/]
    """
    from dcp_zoo.release.submission import check_submission

    row = check_submission(folder, data_root, device=device, workers=workers, progress=progress_bar)
    print(json.dumps(asdict(row), indent=1))
    state = "was measured here" if row.measured is not None else "was not measured here: the folder has no checkpoint"
    output.print(f"Admitted; its accuracy {state}. Add this row to benchmarks/leaderboard in a pull request.")
