"""Fill the zoo: train heads in a sweep, check them, publish those that pass, and pin them.

The result store has the state of every head, so that a build resumes wherever it was stopped:

OUTPUT/results, OUTPUT/failed   see `benchmark.store`
OUTPUT/heads/HEAD               the checkpoint
OUTPUT/refused/HEAD.json        why it was not published
OUTPUT/published/HEAD.json      its repo and its entry in the manifest
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import SEEDS, plan_trials
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.benchmark.trial import SAVED_HEADS, Settings, Trial
from dcp_zoo.data import load_split
from dcp_zoo.errors import ZooError
from dcp_zoo.files import write_file
from dcp_zoo.release import publish
from dcp_zoo.release.gates import refusals

METHOD, BASELINE = "dcp", "zero-shot"
ADVICE = "the same command resumes from there"


@dataclass(frozen=True)
class HeadState:
    """A head of a build: "planned", "failed" and "refused" with the reason, "trained", or "published" with the repo."""

    name: str
    trial: Trial
    state: str
    note: str = ""


def plan_heads(
    models: Sequence[str],
    datasets: Sequence[str] = (),
    shots: Sequence[int] = (),
    seeds: Sequence[int] = SEEDS,
) -> list[Trial]:
    """The trials of a build: one per head, by its model's recipe, and zero-shot CLIP on every dataset."""
    return plan_trials("few-shot", models, [METHOD, BASELINE], datasets, shots, seeds)


def states(output: Path, trials: Sequence[Trial]) -> list[HeadState]:
    """The state of every head of a build."""
    done, failures = store.done(output), store.failures(output)
    return [_state(output, trial, done, failures) for trial in trials if trial.method == METHOD]


def _state(output: Path, trial: Trial, done: set[str], failures: Mapping[str, str]) -> HeadState:
    published, refused = _record(output, "published", trial), _record(output, "refused", trial)
    if published.is_file():
        entry = json.loads(published.read_text())
        return HeadState(trial.head, trial, "published", f"{entry['repo_id']}@{entry['entry']['revision']}")
    if refused.is_file():
        return HeadState(trial.head, trial, "refused", "; ".join(json.loads(refused.read_text())["reasons"]))
    if trial.key in done:
        return HeadState(trial.head, trial, "trained")
    state = "failed" if trial.key in failures else "planned"
    return HeadState(trial.head, trial, state, failures.get(trial.key, ""))


def build(
    trials: Sequence[Trial],
    settings: Settings,
    org: str | None,
    *,
    license: str = publish.LICENSE,
    log: Callable[[str], object] = str,
    **backend: Any,
) -> list[HeadState]:
    """Train, check and publish all heads that are not published yet.

    Args:
        trials: from `plan_heads`.
        settings: of the sweep; its output folder keeps the state.
        org: organisation or user on the Hub; None trains and checks only.
        license: of the trained weights.
        log: receives a line for every head.
        **backend: `run` and `show` of `sweep`.

    Returns:
        The state of every head.

    Raises:
        ZooError: see `sweep` and `publish.publish`. The same call resumes from there.
    """
    sweep(trials, replace(settings, save_heads=True), **backend)
    results, notes = store.results(settings.output), dict[str, str]()
    for head in states(settings.output, trials):
        trial = head.trial
        if head.state not in ("trained", "refused"):  # a refused head is checked again: its reason may be gone
            continue
        if trial.dataset not in notes:
            notes[trial.dataset] = load_split(trial.dataset, settings.data_root).note
        (plain,) = (t for t in trials if (t.model, t.dataset, t.method) == (trial.model, trial.dataset, BASELINE))
        if plain.key not in results:
            log(f"{head.name}: waits for zero-shot CLIP on {trial.dataset}, which failed")
            continue
        try:
            release = publish.prepare(settings.output / SAVED_HEADS / head.name, org or publish.HUB_ORG, license)
            reasons = refusals(results[trial.key], results[plain.key], release, notes[trial.dataset])
        except ZooError as error:  # the checkpoint does not load
            reasons = [str(error)]
        if reasons:
            _save_record(settings.output, "refused", trial, {"reasons": reasons})
            log(f"{head.name}: refused, {'; '.join(reasons)}")
            continue
        _record(settings.output, "refused", trial).unlink(missing_ok=True)
        if org:
            _publish(settings.output, trial, release)
            log(f"{head.name}: published as {release.repo_id}")
    return states(settings.output, trials)


def _publish(output: Path, trial: Trial, release: publish.Release) -> None:
    """Upload one head, add it to its model's collection, and record that. If the process dies before the record is
    written, the upload is repeated, which makes no new commit."""
    revision = publish.publish(release)
    publish.collect(release, f"{trial.model} heads")
    record = {"repo_id": release.repo_id, "entry": release.entry(revision)}
    _save_record(output, "published", trial, record)


def manifest_entries(output: Path, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """The manifest's entries of all heads that were published."""
    return {
        trial.head: json.loads(_record(output, "published", trial).read_text())["entry"]
        for trial in _published(output, trials)
    }


def _published(output: Path, trials: Sequence[Trial]) -> Iterator[Trial]:
    return (trial for trial in trials if trial.method == METHOD and _record(output, "published", trial).is_file())


def _record(output: Path, state: str, trial: Trial) -> Path:
    return output / state / f"{trial.head}.json"


def _save_record(output: Path, state: str, trial: Trial, content: dict[str, Any]) -> None:
    write_file(_record(output, state, trial), json.dumps(content, indent=1) + "\n", ADVICE)
