"""Fill the zoo: train heads in a sweep, check them, publish each that passes, and pin them. A build resumes
from the store of `dcp-zoo benchmark`, the checkpoints in OUTPUT/heads, and HEAD.json in OUTPUT/refused and
OUTPUT/published; a dataset whose heads are all published is not read again. On a hosted GPU: `fill.ipynb`.

    python hub/build.py --models dcp_vitb16 --data-root DATA --output BUILD --dry-run
    python hub/build.py --preset smoke --data-root DATA --output BUILD

Figures of other protocols in the same build, with heads of their own that are not published, go into the
card and the manifest beside the accuracy of the head of the same model, dataset, shots and seed.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import build_state
from rich.markup import escape
from rich.table import Table
from typer import Option, Typer

from dcp_zoo.benchmark import Settings, Trial, pace, plan_trials, store
from dcp_zoo.benchmark.plan import SAVED_HEADS, read_split
from dcp_zoo.benchmark.sweep import Event, sweep
from dcp_zoo.cli import main
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.benchmark import (
    PerTrial,
    Ray,
    backend,
    download_all,
    grid_table,
    numbers,
    several,
    show_event,
    split_commas,
)
from dcp_zoo.cli.console import log, output, progress_bar
from dcp_zoo.data import DATASETS, DatasetSpec, list_datasets
from dcp_zoo.data import download as downloads
from dcp_zoo.errors import ZooError, attempted, check_choice
from dcp_zoo.files import check_writable, write_file
from dcp_zoo.release.publish import BASELINE, HEADS, Release, prepare, publish, refusals
from dcp_zoo.threads import use_threads
from dcp_zoo.zoo.registry import HUB_ORG, MANIFEST, all_heads, trained_heads
from dcp_zoo.zoo.specs import get_spec

app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
METHOD = "dcp"
OTHERS = ("base-to-new", "domain-shift")  # protocols whose figures are added to those of the heads' own
# two small datasets and the smallest of the paper's models, to see that everything works
PRESETS = {"smoke": {"models": ["dcp_vitb32"], "datasets": ["caltech101", "eurosat"], "shots": ["1"], "seeds": ["1"]}}


@dataclass(frozen=True)
class HeadState:
    """A head of a build: "planned", "failed" and "refused" with the reason, "trained", or "published" with
    the repo."""

    name: str
    trial: Trial
    state: str
    note: str = ""
    entry: dict[str, Any] | None = None  # in the manifest, of one that is published


def states(output: Path, trials: Sequence[Trial]) -> list[HeadState]:
    done = store.done(output)
    failures = store.failures(output)
    published = store.read_folder(output / "published")
    refused = store.read_folder(output / "refused")

    def head_of(trial: Trial) -> HeadState:
        if trial.head in published:
            record = published[trial.head]
            note = f"{record['repo_id']}@{record['entry']['revision']}"
            return HeadState(trial.head, trial, "published", note, record["entry"])
        if trial.head in refused:
            return HeadState(trial.head, trial, "refused", "; ".join(refused[trial.head]["reasons"]))
        if trial.key in done:
            return HeadState(trial.head, trial, "trained")
        state = "failed" if trial.key in failures else "planned"
        return HeadState(trial.head, trial, state, failures.get(trial.key, ""))

    return [head_of(trial) for trial in trials if trial.method == METHOD and trial.protocol == HEADS]


def other_figures(head: HeadState, trials: Sequence[Trial], results: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 by protocol, and target or part of the classes, of the other trials with this head's training
    images; by stored statistics, if there are two."""
    found = {}
    for trial in trials:
        same = replace(trial, protocol=HEADS, targets=()) == head.trial
        if trial.protocol in OTHERS and same and trial.key in results:
            for entry in results[trial.key]["results"]:
                if entry["stats"] != "batch":
                    tested = entry["classes"] if trial.protocol == "base-to-new" else entry["target"]
                    found[f"{trial.protocol}, {tested}"] = entry["top1"]
    return found


def remaining(output: Path, trials: Sequence[Trial]) -> list[Trial]:
    """The trials of the datasets that have a head to publish or a trial to run."""
    done = store.done(output)
    datasets = {head.trial.dataset for head in states(output, trials) if head.state != "published"}
    datasets |= {trial.dataset for trial in trials if trial.key not in done}
    return [trial for trial in trials if trial.dataset in datasets]


def build_heads(
    trials: Sequence[Trial],
    settings: Settings,
    org: str | None,
    state_repo: str | None = None,
    *,
    log: Callable[[str], object],
    run: Callable[..., Iterable[Event]],
    show: Callable[[Event, int, int], object],
) -> None:
    """Train, check and, with `org` on the Hub, publish the heads of the trials that are not published yet:
    each as soon as all that its card says is measured. `log` receives a line for every head; `run` and `show`
    are those of `sweep`; the repository `state_repo` of the Hub keeps the output folder."""
    settings = replace(settings, save_heads=METHOD)
    checked = set[str]()

    def check(running: Iterable[Trial]) -> None:
        """Check the heads that wait for none of the running trials."""
        waiting = {(trial.model, trial.dataset, trial.shots, trial.seed) for trial in running}
        for head in states(settings.output, trials):
            trial = head.trial
            needs = {(trial.model, trial.dataset, *draw) for draw in ((trial.shots, trial.seed), (0, 0))}
            # a refused head is checked again: its reason may be gone
            if head.state in ("trained", "refused") and head.name not in checked and not needs & waiting:
                checked.add(head.name)
                release_head(head, trials, settings, org, log)
        if state_repo:
            build_state.save(state_repo, settings.output)

    def checking(todo: Sequence[Trial], settings: Settings) -> Iterator[Event]:
        running = {trial.key: trial for trial in todo}
        check(running.values())
        for event in run(todo, settings):
            yield event
            del running[event.trial.key]
            check(running.values())

    sweep(trials, settings, run=checking, show=show)


def release_head(
    head: HeadState, trials: Sequence[Trial], settings: Settings, org: str | None, log: Callable[[str], object]
) -> None:
    """Publish a trained head that passes, or write why it does not."""
    output = settings.output
    trial = head.trial
    results = store.results(output)
    (plain,) = {
        other.key
        for other in trials
        if (other.method, other.protocol) == (BASELINE, HEADS)
        and (other.model, other.dataset) == (trial.model, trial.dataset)
    }
    if plain not in results:
        log(f"{head.name}: waits for zero-shot CLIP on {trial.dataset}, which failed")
        return
    note = read_split(trial.dataset, settings.data_root).note
    try:
        others = other_figures(head, trials, results)
        repo = f"{org or HUB_ORG}/{head.name}"
        release = prepare(output / SAVED_HEADS / head.name, repo, others=others)
        reasons = refusals(release, results[plain], note)
        if release.row["sha256"] != results[trial.key]["head_sha256"]:
            reasons.append("the checkpoint is not the one that was measured")
        if release.head is None:
            reasons.append("it is not one of the zoo's heads, by dataset, shots and seed")
    except ZooError as error:  # the checkpoint does not load
        reasons = [str(error)]
    if reasons:
        store.write_json(output / "refused" / f"{head.name}.json", {"reasons": reasons})
        log(f"{head.name}: refused, {'; '.join(reasons)}")
        return
    (output / "refused" / f"{head.name}.json").unlink(missing_ok=True)
    if org:  # if the process dies before the record is written, the upload is repeated and makes no new commit
        record = {"repo_id": repo, "entry": manifest_entry(release, publish(release))}
        store.write_json(output / "published" / f"{head.name}.json", record)
        log(f"{head.name}: published as {repo}")


def manifest_entry(release: Release, revision: str) -> dict[str, Any]:
    """The entry of a head in the manifest, pinned to a revision; a bundled head stays bundled."""
    assert release.head
    status = "bundled" if release.head.status == "bundled" else "published"
    return {"status": status, "org": release.repo_id.split("/")[0], **release.row, "revision": revision}


def pin(entries: dict[str, dict[str, Any]]) -> bool:
    """Write heads' entries, by name, into the manifest of a source checkout; False for an installed
    package."""
    if not (MANIFEST.parents[2] / "setup.cfg").is_file() or not os.access(MANIFEST.parent, os.W_OK):
        return False
    write_file(MANIFEST, json.dumps(json.loads(MANIFEST.read_text()) | entries, indent=1) + "\n", "")
    for cached in (trained_heads, all_heads):
        cached.cache_clear()
    return True


def build_trials(
    protocols: list[str], models: list[str], datasets: list[str], shots: list[int], seeds: list[int]
) -> list[Trial]:
    """Those of all protocols, one dataset after the other; of the others with the most shots, and on datasets
    that have other styles."""
    planned = []
    for protocol in (HEADS, *(other for other in OTHERS if other in protocols)):
        asked = shots if protocol == HEADS or not shots else [max(shots)]
        able = [name for name in datasets if protocol != "domain-shift" or DATASETS[name].shifts]
        if able:
            planned += plan_trials(protocol, models, [METHOD, BASELINE], able, asked, seeds)
    return sorted(planned, key=lambda trial: datasets.index(trial.dataset))


@app.command(cls=opt.Command)
def build(
    models: list[str] = several(help="Models of the zoo."),
    preset: str | None = Option(None, help="What is not given: `smoke` is a small build to see that all works."),
    protocols: list[str] = several(help=f"{HEADS}, {', '.join(OTHERS)}. Default: {HEADS}."),
    data_root: Path | None = Option(None, help="Folder with the datasets; what is missing is downloaded."),
    output_dir: Path | None = Option(
        None, "--output", help="Folder for the state of the build, from which it resumes."
    ),
    org: str | None = Option(None, help="Organisation or user on the Hub. Default: train and check, publish nothing."),
    datasets: list[str] = several(help="Default: all 11."),
    shots: list[str] = several(help="Training images per class. Default: 1,2,4,8,16."),
    seeds: list[str] = several(help="Seeds. Default: 1,2,3."),
    state_repo: str | None = Option(
        None, "--state", help="Private repository that keeps OUTPUT, if the disk may be lost: ORG/NAME."
    ),
    agree: opt.Agree = False,
    device: opt.Device = "auto",
    precision: opt.Precision = "float32",
    dry_run: bool = Option(
        False, "--dry-run", help="Measure a step, and show hours, downloads and disk space; start nothing."
    ),
    ray: Ray = None,
    per_trial: PerTrial = None,
) -> None:
    """Fill the zoo: download the datasets, train the heads, check them, publish those that pass, and pin
    them.

    Repeat the command to resume a stopped build; heads that are already published are left alone.

    [dim]python hub/build.py --models dcp_vitb16 --data-root DATA --output BUILD --dry-run[/]
    [dim]python hub/build.py --models dcp_vitb16 --data-root DATA --output BUILD --ray auto --per-trial
    gpus=0.5[/]
    """
    chosen = {"models": models, "datasets": datasets, "shots": shots, "seeds": seeds}
    if preset is not None:
        check_choice("preset", preset, tuple(PRESETS))
        chosen = {name: values or PRESETS[preset][name] for name, values in chosen.items()}
    needed: dict[str, object] = {"--models MODEL": chosen["models"]}
    if not dry_run:
        needed |= {"--data-root DIR": data_root, "--output DIR": output_dir}
    missing_options = [option for option, value in needed.items() if not value]
    if missing_options:
        raise ZooError(f"Pass {', '.join(missing_options)}: python hub/build.py {' '.join(needed)}")
    trials = build_trials(
        split_commas(protocols),
        split_commas(chosen["models"]),
        split_commas(chosen["datasets"]) or list_datasets(),
        numbers(chosen["shots"], "--shots"),
        numbers(chosen["seeds"], "--seeds"),
    )
    settings = Settings(output_dir or Path(os.devnull), data_root, device, precision, progress=progress_bar)
    if state_repo and output_dir and not output_dir.exists():
        build_state.restore(state_repo, output_dir)
    left = remaining(settings.output, trials)
    names = dict.fromkeys(name for trial in left for name in (trial.dataset, *trial.targets))
    missing = downloads.missing([*names], data_root or Path(os.devnull))
    if dry_run:
        show_build_plan(trials, missing, settings)
        return
    assert data_root
    check_writable(settings.output)
    run = backend(ray, per_trial)
    use_threads()
    absent = download_all(missing, data_root, agree)
    ready = [trial for trial in left if trial.dataset not in absent]
    build_heads(ready, settings, org, state_repo, log=log, run=run, show=show_event)
    heads = states(settings.output, trials)
    entries = {head.name: head.entry for head in heads if head.entry}
    if entries and pin(entries):
        output.print(f"{len(entries)} heads are pinned in {MANIFEST}: commit it.")
    show_states(heads)
    bad = sum(head.state in ("failed", "refused") for head in heads)
    lost = {trial.key for trial in trials if trial.protocol in OTHERS} & store.failures(settings.output).keys()
    if bad or lost or absent:
        others = f", {len(lost)} trials of other protocols failed" if lost else ""
        others += f", and {', '.join(absent)} could not be downloaded" if absent else ""
        raise ZooError(f"{bad} heads failed or were refused{others}. Repeat the command to try them again.")


def show_build_plan(trials: Sequence[Trial], missing: Sequence[DatasetSpec], settings: Settings) -> None:
    heads = states(settings.output, trials)
    results = store.results(settings.output)
    output.print(grid_table(trials))
    show_states(heads)
    left = [trial for trial in trials if trial.key not in results]
    for line in pace.costs(left, missing, settings):
        output.print(line, soft_wrap=True)
    kept = sum(get_spec(head.trial.model).head_mb for head in heads) / 1e3
    output.print(f"The {len(heads)} heads take {kept:.2f} GB.")
    output.print(timetable(left, settings))


def timetable(trials: Sequence[Trial], settings: Settings) -> Table:
    """After how many hours each dataset is done, by the measured paces; without the time of downloads, and of
    models that cannot be measured."""
    table = Table("dataset", "heads", "hours", "done after", title="Hours, without downloads")
    total = 0.0
    for dataset, group in groupby(trials, lambda trial: trial.dataset):
        of_dataset = [*group]
        hours = 0.0
        for model in dict.fromkeys(trial.model for trial in of_dataset):
            measured = attempted(pace.pace, model, settings.device, settings.precision)
            if isinstance(measured, pace.Pace):
                of_model = [trial for trial in of_dataset if trial.model == model]
                hours += pace.estimated_seconds(of_model, measured, settings.data_root) / 3600
        total += hours
        heads = sum((trial.method, trial.protocol) == (METHOD, HEADS) for trial in of_dataset)
        table.add_row(dataset, str(heads), f"{hours:.1f}", f"{total:.1f}")
    return table


def show_states(heads: Sequence[HeadState]) -> None:
    """How many heads are in each state, and the reasons of those that are not published."""
    counts = Counter(head.state for head in heads)
    output.print(", ".join(f"{count} {state}" for state, count in counts.items()) + ".")
    for head in heads:
        if head.state in ("failed", "refused"):
            output.print(f"[red]{head.state}[/] {head.name}: {escape(head.note)}", soft_wrap=True)


if __name__ == "__main__":
    main(app)
