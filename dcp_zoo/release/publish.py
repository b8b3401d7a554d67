"""Publish a head on the Hub: checks of its folder, its model card, the upload, and its entry in the index."""

import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.benchmark import Settings, plan_trials, store
from dcp_zoo.benchmark.plan import read_split
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.errors import ZooError, warn
from dcp_zoo.fields import Values
from dcp_zoo.files import sha256_of
from dcp_zoo.heads.config import WEIGHTS_NAME, HeadConfig, read_config, weights_file
from dcp_zoo.heads.head import load_head
from dcp_zoo.hub import (
    HTTP_ERRORS,
    HUB_LIBRARY,
    INDEX_NAME,
    INDEX_REPO,
    download_file,
    explained,
    forget_index,
)
from dcp_zoo.release import CARD_NAME, LICENSE, ONNX_FILE, accuracies, make_card, upload
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import HeadEntry, find_head

WAITS = (2, 10, 60, 300)  # seconds before another attempt; the Hub counts requests in five minutes
PASSING = (408, 412, 429, 500, 502, 503, 504)  # a rate limit, a server in trouble, or another commit
T = TypeVar("T")
CARD_INFO = ("dataset", "shots", "seed", "recipe", "split_sha256", "subset_sha256")  # what no card may lack
HEADS = "few-shot"  # the protocol of the zoo's heads
BASELINE = "zero-shot"  # the method that they must match
BELOW_ZERO_SHOT = 2.0  # points that a head may lose against zero-shot CLIP, besides chance
STATS_APART = 1.0  # points between stored and batch statistics, besides chance


@dataclass(frozen=True)
class Release:
    """A checkpoint folder that loads, with what is published of it."""

    folder: Path
    head: HeadEntry | None  # of the zoo, which its index lists; None for any other head
    repo_id: str
    card: ModelCard
    info: Values  # what the checkpoint stores about its training
    row: Values  # in the index, once it has a revision


def prepare(
    folder: str | Path, repo_id: str, license: str = LICENSE, others: dict[str, float] | None = None
) -> Release:
    """Check a checkpoint folder as strictly as loading does, and build its card in memory. ZooError if it
    does not load, claims a dataset that it is not of, or is not the zoo's head after which the repo is named.

    Args:
        folder: as training writes it.
        repo_id: "ORG/NAME"; a NAME such as dcp_vitb16.dtd-4shot makes it a head of the zoo.
        license: of the trained weights, as an identifier of the Hub.
        others: top-1 accuracies in percent, by protocol, that the card and the index have besides.
    """
    folder = Path(folder)
    config = read_config(folder)
    head = zoo_head(config, repo_id.rpartition("/")[2])
    with warnings.catch_warnings(), skip_init():
        warnings.simplefilter("ignore")  # CLIP has no weights: nothing is downloaded, and none are drawn
        model = create_model(f"local-dir:{folder}", False)
        model.encoder.remember_weights(config["dcp"].get("clip_fingerprint", ""))
        load_head(model, folder)
    weights = folder / WEIGHTS_NAME
    if weights_file(folder) != weights:
        problem = f"A save into {folder} was killed, or is going on: {WEIGHTS_NAME} is not the head's yet"
        raise ZooError(f"{problem}. Load the head, and publish what save_pretrained writes into another folder.")
    card = make_card(model, repo_id, license, weights.stat().st_size, (folder / ONNX_FILE).exists(), others)
    row: Values = {
        "revision": "",
        "sha256": sha256_of(weights),
        "license": license,
        "metrics": model.info.get("metrics", {}) | (others or {}),
    }
    return Release(folder, head, repo_id, card, model.info, row)


def zoo_head(config: HeadConfig, name: str) -> HeadEntry | None:
    """The zoo's head of this name; None if it has none. ZooError if the checkpoint is of another."""
    head = find_head(name)
    if head is None:
        return None
    stored = config["dcp"]
    trained = [config["architecture"], stored["head"], *(stored.get(key) for key in ("dataset", "shots", "seed"))]
    if trained != [head.model, "dcp", head.dataset, head.shots, head.seed]:
        raise ZooError(
            f"This is not the zoo's head {name}: its model, kind, dataset, shots and seed are {trained}. Name its repo "
            "otherwise."
        )
    return head


def zero_shot(head: HeadEntry, settings: Settings) -> tuple[Values, str]:
    """What a sweep stores of zero-shot CLIP on the test images of a head's dataset, which is measured unless
    its folder has it, and the note of the dataset's split. ZooError if that fails."""
    (trial,) = plan_trials(HEADS, [head.model], [BASELINE], [head.dataset], [head.shots], [head.seed])
    failed = sweep([trial], settings)
    if failed:
        raise ZooError(f"Zero-shot CLIP cannot be measured on {head.dataset}: {failed[trial]}")
    return store.results(settings.output)[trial.key], read_split(head.dataset, settings.data_root).note


def check_accuracy(release: Release, data_root: Path | None, device: str = "auto") -> None:
    """Raise ZooError for a head of the zoo that `refusals` has reasons against; zero-shot CLIP is measured on
    the test images of its dataset, below `data_root`. Other heads may be as they are."""
    if release.head is None:
        return
    if data_root is None:
        raise ZooError(
            f"{release.head.name} is a head of the zoo, which must not lose to zero-shot CLIP: pass --data-root DIR, "
            "where its dataset is. Or give the repo a name of your own."
        )
    with tempfile.TemporaryDirectory() as sweep_folder:
        plain, note = zero_shot(release.head, Settings(Path(sweep_folder), data_root, device))
    reasons = refusals(release, plain, note)
    if reasons:
        raise ZooError(f"{release.folder} is refused: {'; '.join(reasons)}.")


def refusals(release: Release, zero_shot: Values, split_note: str) -> list[str]:
    """Why a head of the zoo must not be published; [] if it may.

    Args:
        release: the checkpoint, with what it says was measured of it.
        zero_shot: what was measured of zero-shot CLIP, as a sweep stores it.
        split_note: what is wrong with the dataset's split, or "".
    """
    found = []
    info = release.info
    first, last = (info.get(name, math.nan) for name in ("first_loss", "last_loss"))
    if not (math.isfinite(first) and last <= first):
        found.append(f"its loss rose, is not finite or missing: {first:.3f}, then {last:.3f}")
    (plain,) = zero_shot["results"]
    images = plain["images"]
    is_same_split = info.get("split_sha256") == zero_shot["split_sha256"]
    if not is_same_split or info.get("test_images", images) != images:  # a sweep always tests on all
        found.append("it and zero-shot CLIP were tested on other images")
    missing = [name for name in CARD_INFO if not info.get(name)]
    if missing:
        found.append(f"its card lacks {', '.join(missing)}")
    top1 = accuracies(info.get("metrics", {}))
    if {"stored", "batch"} <= top1.keys():
        stored = top1["stored"]
        batch = top1["batch"]
        clip = plain["top1"]
        if stored < clip - BELOW_ZERO_SHOT - chance(clip, images):
            found.append(f"top-1 {stored:.2f} is too far below zero-shot CLIP's {clip:.2f}")
        if abs(stored - batch) > STATS_APART + chance(batch, images):
            found.append(f"top-1 with stored and batch statistics, {stored:.2f} and {batch:.2f}, are too far apart")
    else:
        found.append("its accuracy was not measured with both kinds of statistics")
    return [*found, split_note] if split_note else found


def chance(percent: float, images: int) -> float:
    """Two standard errors, in points, of an accuracy measured on that many images."""
    return 2 * math.sqrt(percent * (100 - percent) / images)


def publish(release: Release, replaces: str | None = None) -> str:
    """Write the card into the folder, and upload it with the checkpoint. A head of the zoo is listed in the
    organisation's index. Returns the commit. ZooError if the Hub refuses a part.

    Args:
        replaces: the repo of an older head, whose card then points to this one.
    """
    release.card.save(release.folder / CARD_NAME)
    revision = retried(lambda: upload(release.folder, release.repo_id))
    if release.head:
        rows: Values = {release.head.name: {**release.row, "revision": revision}}
        retried(lambda: add_to_index(release.repo_id.split("/")[0], rows))
    if replaces:
        card = ModelCard.load(download_file(replaces, CARD_NAME))
        card.data["new_version"] = release.repo_id
        with explained(replaces, CARD_NAME):
            HfApi(library_name=HUB_LIBRARY).upload_file(
                path_or_fileobj=str(card).encode(), path_in_repo=CARD_NAME, repo_id=replaces
            )
    return revision


def retried(call: Callable[[], T]) -> T:
    """The result of `call`, tried again after a pause, with a warning, if the Hub is busy or a connection is
    lost, or another commit came first: the client tries again what it downloads, and not what it commits. Not
    if the Hub did not answer from the first."""
    for attempt, wait in enumerate(WAITS, 2):
        try:
            return call()
        except ZooError as told:
            if not may_pass(told.__cause__):
                raise
            warn(f"{told} Attempt {attempt} follows in {wait} s.")
            time.sleep(wait)
    return call()


def may_pass(error: BaseException | None) -> bool:
    """Whether a failure of the client may be gone at the next attempt."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in PASSING
    is_lost = isinstance(error, (OSError, *HTTP_ERRORS)) and getattr(error, "errno", None) is None
    return is_lost and not isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled))


def add_to_index(org: str, rows: Mapping[str, Values]) -> None:
    """Add heads' rows, by name, to the index that `dcp_zoo.list_pretrained` reads; others' rows stay.
    ZooError for what the Hub refuses, such as a commit after another one."""
    repo = f"{org}/{INDEX_REPO}"
    api = HfApi(library_name=HUB_LIBRARY)
    with explained(repo, INDEX_NAME):
        api.create_repo(repo, exist_ok=True)
        parent = api.repo_info(repo).sha
        try:
            old = json.loads(Path(api.hf_hub_download(repo, INDEX_NAME, revision=parent)).read_text())
        except EntryNotFoundError:  # the first head
            old = {}
        new = old | rows
        if new != old:
            add = CommitOperationAdd(INDEX_NAME, f"{json.dumps(new, indent=1, sort_keys=True)}\n".encode())
            api.create_commit(repo, [add], commit_message=f"List {', '.join(rows)}", parent_commit=parent)
    forget_index()
