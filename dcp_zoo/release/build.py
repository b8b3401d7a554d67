"""Fill the zoo: train heads in a sweep, check them, publish those that pass, and pin them. A build resumes from the
store of `benchmark`, the checkpoints in OUTPUT/heads, and HEAD.json in OUTPUT/refused and OUTPUT/published."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import SAVED_HEADS, Settings, Trial
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.data import load_split
from dcp_zoo.errors import ZooError
from dcp_zoo.release import publish
from dcp_zoo.release.publish import CARD_INFO, Release
from dcp_zoo.zoo.registry import HUB_ORG

METHOD, BASELINE = "dcp", "zero-shot"
BELOW_ZERO_SHOT = 2.0  # points that a head may lose against zero-shot CLIP, besides chance
STATS_APART = 1.0  # points between stored and batch statistics, besides chance


@dataclass(frozen=True)
class HeadState:
    """A head of a build: "planned", "failed" and "refused" with the reason, "trained", or "published" with the repo."""

    name: str
    trial: Trial
    state: str
    note: str = ""
    entry: dict[str, Any] | None = None  # in the manifest, of one that is published


def states(output: Path, trials: Sequence[Trial]) -> list[HeadState]:
    done, failures = store.done(output), store.failures(output)
    published, refused = (store.read_folder(output / state) for state in ("published", "refused"))

    def head_of(trial: Trial) -> HeadState:
        if record := published.get(trial.head):
            note = f"{record['repo_id']}@{record['entry']['revision']}"
            return HeadState(trial.head, trial, "published", note, record["entry"])
        if record := refused.get(trial.head):
            return HeadState(trial.head, trial, "refused", "; ".join(record["reasons"]))
        if trial.key in done:
            return HeadState(trial.head, trial, "trained")
        state = "failed" if trial.key in failures else "planned"
        return HeadState(trial.head, trial, state, failures.get(trial.key, ""))

    return [head_of(trial) for trial in trials if trial.method == METHOD]


def build_heads(
    trials: Sequence[Trial], settings: Settings, org: str | None, *, log: Callable[[str], object], **backend: Any
) -> None:
    """Train, check and, with `org` on the Hub, publish the heads of the trials that are not published yet. `log`
    receives a line for every head; `backend` is `run` and `show` of `sweep`."""
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
            store.write_json(output / "refused" / f"{head.name}.json", {"reasons": reasons})
            log(f"{head.name}: refused, {'; '.join(reasons)}")
            continue
        (output / "refused" / f"{head.name}.json").unlink(missing_ok=True)
        if org:  # if the process dies before the record is written, the upload is repeated and makes no new commit
            entry = release.entry(publish.publish(release))
            record = {"repo_id": release.repo_id, "entry": entry}
            store.write_json(output / "published" / f"{head.name}.json", record)
            log(f"{head.name}: published as {release.repo_id}")


def refusals(result: Mapping[str, Any], zero_shot: Mapping[str, Any], release: Release, split_note: str) -> list[str]:
    """Why a head must not be published; [] if it may. `result` and `zero_shot` are the result files of its trial and of
    zero-shot CLIP on the same images; `split_note` is what is wrong with the dataset's split, or ""."""
    found, (first, last) = [], (result["info"].get(name, math.nan) for name in ("first_loss", "last_loss"))
    if not (math.isfinite(first) and math.isfinite(last)):
        found.append("its losses are missing or not finite")
    elif last > first:
        found.append(f"its loss rose from {first:.3f} to {last:.3f}")
    if release.sha256 != result["head_sha256"]:
        found.append("the checkpoint is not the one that was measured")
    images, (plain,) = result["results"][0]["images"], zero_shot["results"]
    if (result["split_sha256"], images) != (zero_shot["split_sha256"], plain["images"]):
        found.append("it and zero-shot CLIP were tested on other images")
    missing = [name for name in CARD_INFO if name != "converted_from" and not release.info.get(name)]
    if missing:
        found.append(f"its card lacks {', '.join(missing)}")
    top1 = {entry["stats"]: entry["top1"] for entry in result["results"]}
    if {"stored", "batch"} <= top1.keys():
        stored, batch, clip = top1["stored"], top1["batch"], plain["top1"]
        below, apart = BELOW_ZERO_SHOT + chance(clip, images), STATS_APART + chance(batch, images)
        if stored < clip - below:
            found.append(f"top-1 {stored:.2f} is over {below:.1f} percentage points below zero-shot CLIP's {clip:.2f}")
        if abs(stored - batch) > apart:
            found.append(f"stored {stored:.2f} and batch {batch:.2f} are over {apart:.1f} percentage points apart")
    else:
        found.append("its accuracy was not measured with both kinds of statistics")
    return [*found, split_note] if split_note else found


def chance(percent: float, images: int) -> float:
    """Two standard errors, in points, of an accuracy measured on that many images."""
    share = min(max(percent / 100, 0.5 / images), 1 - 0.5 / images)  # at least half an image away from 0 and 1
    return 200 * math.sqrt(share * (1 - share) / images)
