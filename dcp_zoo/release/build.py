"""Fill the zoo: train heads in a sweep, check them, publish those that pass, and pin them.

The result store has the state of every head, so that a build resumes wherever it was stopped:

OUTPUT/results, OUTPUT/failed   see `benchmark.store`
OUTPUT/heads/HEAD               the checkpoint
OUTPUT/refused/HEAD.json        why it was not published
OUTPUT/published/HEAD.json      its repo and its entry in the manifest
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import plan_trials
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.benchmark.trial import SAVED_HEADS, Settings, Trial
from dcp_zoo.data import load_split
from dcp_zoo.errors import ZooError
from dcp_zoo.files import write_file
from dcp_zoo.release import publish
from dcp_zoo.release.gates import refusals
from dcp_zoo.zoo.registry import HUB_ORG

METHOD, BASELINE = "dcp", "zero-shot"


@dataclass(frozen=True)
class HeadState:
    """A head of a build: "planned", "failed" and "refused" with the reason, "trained", or "published" with the repo."""

    name: str
    trial: Trial
    state: str
    note: str = ""


def plan_heads(
    models: Sequence[str], datasets: Sequence[str], shots: Sequence[int], seeds: Sequence[int]
) -> list[Trial]:
    """The trials of a build: one per head, by its model's recipe, and zero-shot CLIP on every dataset."""
    return plan_trials("few-shot", models, [METHOD, BASELINE], datasets, shots, seeds)


def states(output: Path, trials: Sequence[Trial]) -> list[HeadState]:
    """The state of every head of a build."""
    done, failures = store.done(output), store.failures(output)
    found = []
    for trial in trials:
        if trial.method != METHOD:
            continue
        state, note = "trained" if trial.key in done else "planned", ""
        if record := _read_record(output, "published", trial.head):
            state, note = "published", f"{record['repo_id']}@{record['entry']['revision']}"
        elif record := _read_record(output, "refused", trial.head):
            state, note = "refused", "; ".join(record["reasons"])
        elif state == "planned" and trial.key in failures:
            state, note = "failed", failures[trial.key]
        found.append(HeadState(trial.head, trial, state, note))
    return found


def build_heads(
    trials: Sequence[Trial],
    settings: Settings,
    org: str | None,
    *,
    log: Callable[[str], object] = str,
    **backend: Any,
) -> None:
    """Train, check and publish all heads that are not published yet.

    Args:
        trials: from `plan_heads`.
        settings: of the sweep; its output folder keeps the state.
        org: organisation or user on the Hub; None trains and checks only.
        log: receives a line for every head.
        **backend: `run` and `show` of `sweep`.

    Raises:
        ZooError: see `sweep` and `publish.publish`. The same call resumes from there.
    """
    sweep(trials, replace(settings, save_heads=True), **backend)
    output, results = settings.output, store.results(settings.output)
    split_note = cache(lambda dataset: load_split(dataset, settings.data_root).note)
    zero_shot = {(trial.model, trial.dataset): trial.key for trial in trials if trial.method == BASELINE}
    for head in states(output, trials):
        trial, plain = head.trial, zero_shot[head.trial.model, head.trial.dataset]
        if head.state not in ("trained", "refused"):  # a refused head is checked again: its reason may be gone
            continue
        if plain not in results:
            log(f"{head.name}: waits for zero-shot CLIP on {trial.dataset}, which failed")
            continue
        note = split_note(trial.dataset)
        try:
            release = publish.prepare(output / SAVED_HEADS / head.name, org or HUB_ORG)
            reasons = refusals(results[trial.key], results[plain], release, note)
        except ZooError as error:  # the checkpoint does not load
            reasons = [str(error)]
        if reasons:
            _write_record(output, "refused", head.name, {"reasons": reasons})
            log(f"{head.name}: refused, {'; '.join(reasons)}")
            continue
        _record(output, "refused", head.name).unlink(missing_ok=True)
        if org:  # if the process dies before the record is written, the upload is repeated and makes no new commit
            revision = publish.publish(release)
            publish.collect(release, f"{trial.model} heads")
            entry = release.entry(revision)
            _write_record(output, "published", head.name, {"repo_id": release.repo_id, "entry": entry})
            log(f"{head.name}: published as {release.repo_id}")


def manifest_entries(output: Path, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """The manifest's entries of all heads that were published."""
    records = {trial.head: _read_record(output, "published", trial.head) for trial in trials if trial.method == METHOD}
    return {name: record["entry"] for name, record in records.items() if record}


def _record(output: Path, state: str, head: str) -> Path:
    return output / state / f"{head}.json"


def _read_record(output: Path, state: str, head: str) -> dict[str, Any] | None:
    path = _record(output, state, head)
    return json.loads(path.read_text()) if path.is_file() else None


def _write_record(output: Path, state: str, head: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_file(_record(output, state, head), text, "the same command resumes from there")
