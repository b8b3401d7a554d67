"""Heads of the zoo to the Hub, see `python hub/publish.py --help`; `hub/build.py` publishes many."""

import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from typer import Argument, Option, Typer

from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.benchmark import Settings, plan_trials, store
from dcp_zoo.benchmark.plan import read_split
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.cli import main
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import log, output
from dcp_zoo.data import DATASETS
from dcp_zoo.errors import ZooError, warn
from dcp_zoo.files import sha256_of, write_file
from dcp_zoo.heads.config import WEIGHTS_NAME, weights_file
from dcp_zoo.heads.head import load_head
from dcp_zoo.hub import HTTP_ERRORS, HUB_LIBRARY, INDEX_NAME, INDEX_REPO, explained, forget_index, is_offline
from dcp_zoo.release import CARD_NAME, LICENSE, ONNX_FILE, make_card, not_of_dataset, upload
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import MANIFEST, HeadEntry, IndexRow, all_heads, get_head, trained_heads
from dcp_zoo.zoo.resolve import Source, resolve

app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
WAITS = (2, 10, 30, 120)  # seconds before another attempt
PASSING = (408, 412, 429, 500, 502, 503, 504)  # a rate limit, a server in trouble, or another commit
T = TypeVar("T")
CARD_INFO = ("dataset", "shots", "seed", "recipe", "split_sha256", "subset_sha256")  # what no card may lack
HEADS, BASELINE = "few-shot", "zero-shot"  # the protocol whose heads are published, and the method that they must match
BELOW_ZERO_SHOT = 2.0  # points that a head may lose against zero-shot CLIP, besides chance
STATS_APART = 1.0  # points between stored and batch statistics, besides chance
ANY_HEAD = "Upload other heads with dcp_zoo.push_to_hub(model, 'ORG/NAME')."


@dataclass(frozen=True)
class Release:
    """A checkpoint folder that has passed the checks for the Hub."""

    folder: Path
    head: HeadEntry  # its entry in the registry
    repo_id: str
    sha256: str
    card: ModelCard
    info: dict[str, Any]  # what the checkpoint stores about its training
    license: str
    others: dict[str, float] = field(default_factory=dict)  # top-1 in other protocols

    def entry(self, revision: str) -> dict[str, Any]:
        """The entry in the manifest, pinned to a revision; a bundled head stays bundled."""
        return {
            "status": "bundled" if self.head.status == "bundled" else "published",
            "org": self.repo_id.split("/")[0],
            "revision": revision,
            "sha256": self.sha256,
            "license": self.license,
            "metrics": self.info.get("metrics", {}) | self.others,
        }


def prepare(folder: str | Path, org: str, license: str = LICENSE, others: dict[str, float] | None = None) -> Release:
    """Check a checkpoint folder, written by training for one of the registry's heads, as strictly as loading
    does, and build its card in memory. `org` is an organisation or user on the Hub, `license` that of the
    trained weights, and `others` top-1 accuracies that the card and the manifest have besides, by
    protocol."""
    folder, name = Path(folder), f"local-dir:{folder}"
    source = resolve(name)
    assert source.config is not None
    head = entry_of(source)
    with warnings.catch_warnings(), skip_init():
        warnings.simplefilter("ignore")  # CLIP has no weights: nothing is downloaded, and none are drawn
        model = create_model(name, False)
        model.encoder.remember_weights(source.config["dcp"].get("clip_fingerprint", ""))
        load_head(model, folder)
    if problem := not_of_dataset(model):
        raise ZooError(f"{folder} cannot be published. {problem}")
    repo_id, weights = f"{org}/{head.name}", folder / WEIGHTS_NAME
    if weights_file(folder) != weights:  # loading reads it, and nobody else would
        raise ZooError(f"The last save of {folder} was killed: load the head, save it again, then publish it.")
    card = make_card(model, repo_id, license, weights.stat().st_size, (folder / ONNX_FILE).exists(), others)
    return Release(folder, head, repo_id, sha256_of(weights), card, model.info, license, others or {})


def measured(release: Release) -> dict[str, Any]:
    """What the checkpoint says was measured of it, as a sweep stores it."""
    info, counts = release.info, DATASETS[release.head.dataset].counts
    images = info.get("test_images", counts and counts[2])  # a sweep leaves it out of a head: there it is the whole
    top1 = {stats: info.get("metrics", {}).get(f"top1_{stats}") for stats in ("stored", "batch")}
    entries = [{"stats": stats, "top1": value, "images": images} for stats, value in top1.items()]
    return {
        "results": [entry for entry in entries if entry["top1"] is not None],
        "info": info,
        "split_sha256": info.get("split_sha256"),
        "head_sha256": release.sha256,
    }


def zero_shot(head: HeadEntry, settings: Settings) -> tuple[dict[str, Any], str]:
    """What a sweep stores of zero-shot CLIP on the test images of a head's dataset, which is measured unless
    its folder has it, and the note of the dataset's split. ZooError if that fails."""
    (trial,) = plan_trials(HEADS, [head.model], [BASELINE], [head.dataset], [head.shots], [head.seed])
    if failed := sweep([trial], settings):
        raise ZooError(f"Zero-shot CLIP cannot be measured on {head.dataset}: {failed[trial]}")
    return store.results(settings.output)[trial.key], read_split(head.dataset, settings.data_root).note


def refusals(result: Mapping[str, Any], zero_shot: Mapping[str, Any], release: Release, split_note: str) -> list[str]:
    """Why a head must not be published; [] if it may. `result` and `zero_shot` are what was measured of it
    and of zero-shot CLIP, as a sweep stores it; `split_note` is what is wrong with the dataset's split, or
    ""."""
    found, (first, last) = [], (result["info"].get(name, math.nan) for name in ("first_loss", "last_loss"))
    if not (math.isfinite(first) and math.isfinite(last)):
        found.append("its losses are missing or not finite")
    elif last > first:
        found.append(f"its loss rose from {first:.3f} to {last:.3f}")
    if release.sha256 != result["head_sha256"]:
        found.append("the checkpoint is not the one that was measured")
    (plain,) = zero_shot["results"]
    images = plain["images"]
    tested = {(result["split_sha256"], entry["images"]) for entry in result["results"]}
    if tested - {(zero_shot["split_sha256"], images)}:
        found.append("it and zero-shot CLIP were tested on other images")
    missing = [name for name in CARD_INFO if not release.info.get(name)]
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


def entry_of(source: Source) -> HeadEntry:
    """The row of the registry that a checkpoint is of."""
    assert source.config is not None
    block, folder = source.config["dcp"], source.folder
    if block["head"] != "dcp":
        raise ZooError(f"{folder} is a head of {block['method']}: the zoo has heads of dcp only. {ANY_HEAD}")
    try:
        dataset, shots, seed = (block[name] for name in ("dataset", "shots", "seed"))
        return get_head(f"{source.architecture}.{dataset}-{shots}shot" + (f"-seed{seed}" if seed != 1 else ""))
    except (KeyError, ZooError) as error:
        reason = error if isinstance(error, ZooError) else f"It does not say its {error}."
        raise ZooError(
            f"{folder} is not one of the zoo's heads, by dataset, shots and seed. {reason} {ANY_HEAD}"
        ) from error


def publish(release: Release) -> str:
    """Write the card into the folder, upload it with the checkpoint, list it in the organisation's index,
    and return the commit."""
    release.card.save(release.folder / CARD_NAME)
    revision = retried(lambda: upload(release.folder, release.repo_id))
    entries = {release.head.name: release.entry(revision)}
    retried(lambda: add_to_index(release.repo_id.split("/")[0], entries))
    return revision


def retried(call: Callable[[], T]) -> T:
    """The result of `call`, tried again after a pause, with a warning, if the Hub is busy or a connection is
    lost, or another commit came first: the client tries again what it downloads, and not what it commits."""
    for attempt, wait in enumerate(WAITS, 2):
        try:
            return call()
        except ZooError as told:
            error = told.__cause__
            response = getattr(error, "response", None)
            lost = isinstance(error, (OSError, *HTTP_ERRORS)) and getattr(error, "errno", None) is None
            if response.status_code not in PASSING if response is not None else not lost or is_offline(error):
                raise
            after = getattr(response, "headers", {}).get("Retry-After", "")
            wait = max(wait, int(after) if after.isdecimal() else 0)
            warn(f"{told} Attempt {attempt} of {len(WAITS) + 1} follows in {wait} s.")
            time.sleep(wait)
    return call()


def add_to_index(org: str, entries: dict[str, dict[str, Any]]) -> None:
    """Add heads' entries, by name, to the index that `dcp_zoo.list_pretrained` reads; others' rows stay.
    ZooError for what the Hub refuses, such as a commit after another one."""
    repo, api = f"{org}/{INDEX_REPO}", HfApi(library_name=HUB_LIBRARY)
    rows = {name: {key: entry[key] for key in IndexRow.__annotations__} for name, entry in entries.items()}
    with explained(repo, INDEX_NAME):
        api.create_repo(repo, exist_ok=True)
        parent = api.repo_info(repo).sha
        try:
            old = json.loads(Path(api.hf_hub_download(repo, INDEX_NAME, revision=parent)).read_text())
        except EntryNotFoundError:  # the first head
            old = {}
        if (new := old | rows) != old:
            add = CommitOperationAdd(INDEX_NAME, f"{json.dumps(new, indent=1, sort_keys=True)}\n".encode())
            api.create_commit(repo, [add], commit_message=f"List {', '.join(rows)}", parent_commit=parent)
    forget_index()


def pin(entries: dict[str, dict[str, Any]]) -> bool:
    """Write heads' entries, by name, into the manifest of a source checkout; False for an installed
    package."""
    if not (MANIFEST.parents[2] / "setup.cfg").is_file() or not os.access(MANIFEST.parent, os.W_OK):
        return False
    write_file(MANIFEST, json.dumps(json.loads(MANIFEST.read_text()) | entries, indent=1) + "\n", "")
    for cached in (trained_heads, all_heads):
        cached.cache_clear()
    return True


@app.command(cls=opt.Command)
def publish_head(
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="Checkpoint folder of one of the zoo's heads, written by training.")
    ],
    org: Annotated[str, Option(help="Organisation or user on the Hub.")],
    data_root: Annotated[Path, Option(help="Folder with the datasets, for zero-shot CLIP's accuracy.")],
    device: opt.Device = "auto",
    license: Annotated[str, Option(help="Licence of the trained weights.")] = LICENSE,
    dry_run: Annotated[bool, Option("--dry-run", help="Check the folder and show the card; upload nothing.")] = False,
) -> None:
    """Check a trained head as a build does, write its model card, upload it to the Hub, and pin it in the
    manifest.

    [dim]python hub/publish.py dcp_vitb16.imagenet-16shot --org MY_ORG --data-root DATA --dry-run[/]

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    release = prepare(folder, org, license)
    with tempfile.TemporaryDirectory() as sweep_folder:
        plain, note = zero_shot(release.head, Settings(Path(sweep_folder), data_root, device))
    if reasons := refusals(measured(release), plain, release, note):
        raise ZooError(f"{folder} is refused: {'; '.join(reasons)}.")
    if dry_run:
        print(release.card.content)
        log(f"The checkpoint is valid. It would be uploaded to {release.repo_id}; nothing was sent.")
        return
    revision = publish(release)
    output.print(f"Published as {release.repo_id} at {revision}.")
    entries = {release.head.name: release.entry(revision)}
    if pin(entries):
        output.print(f"Pinned in {MANIFEST}: commit it.")
    else:
        text = json.dumps(entries, indent=1)
        output.print(f"To pin it, add this to dcp_zoo/zoo/heads.json in a source checkout:\n{text}")


if __name__ == "__main__":
    main(app)
