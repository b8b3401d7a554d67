"""Heads on the Hub: the model card, publishing with it, pinning in the manifest, measuring what a card claims."""

import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from dcp_zoo.data import load_labelled, training_split
from dcp_zoo.data.specs import HUB_SCHEME, SHARD_SCHEME
from dcp_zoo.data.tables import HubDataset
from dcp_zoo.deploy.hub_files import ONNX_FILES, PREPROCESSOR, write_client_files
from dcp_zoo.deploy.quantize import Calibration
from dcp_zoo.errors import ZooError, writing_to
from dcp_zoo.files import check_empty, sha256_of, unfinished, write_file
from dcp_zoo.hub import HUB_LIBRARY, download_file, explained, retried
from dcp_zoo.model._torch import skip_init
from dcp_zoo.model.config import CONFIG_NAME, COUPLINGS, WEIGHTS_NAME
from dcp_zoo.model.head import Head, load_head
from dcp_zoo.training.device import pick_device
from dcp_zoo.training.evaluation import measure
from dcp_zoo.training.recipes import NO_CLASSIFIER
from dcp_zoo.training.sources import Progress, image_source, no_progress
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import MANIFEST, MODELS, HeadEntry, all_heads, get_head, trained_heads
from dcp_zoo.zoo.resolve import parse_name, resolve

CARD_NAME = "README.md"
CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
CARD_INFO = ("dataset", "shots", "seed", "recipe", "split_sha256", "subset_sha256", "converted_from")
TAGS = ["image-classification", "few-shot", "prompt-learning", "clip", "open_clip", "timm", "dcp"]
MODES = {  # of an accuracy, and their names in a card
    "stored": "top-1, stored statistics",
    "batch": "top-1, batch statistics",
    NO_CLASSIFIER: "top-1, without the text probe",
}


def accuracies(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 accuracy in percent by mode, of the metrics in a config.json or the manifest."""
    return {mode: metrics[f"top1_{mode}"] for mode in MODES if f"top1_{mode}" in metrics}


def make_card(model: Head, repo_id: str, license: str, size: int, onnx: bool = False) -> ModelCard:
    """The model card of a head whose weights have `size` bytes; `onnx`: the repo has ONNX files for other clients."""
    spec = MODELS.get(model.architecture)
    base = spec.clip_repo if spec and model.clip_source == spec.clip_pretrained else None
    options, _ = model.method_config()
    about: dict[str, Any] = {"model": model, "info": model.info, "spec": spec, "options": options, "base": base}
    return ModelCard.from_template(
        _metadata(model, repo_id, license, base),
        template_path=str(CARD_TEMPLATE),
        repo_id=repo_id,
        size=f"{size / 1e6:.1f} MB",
        onnx=onnx,
        dataset=public_name(model.info.get("dataset")),
        whose=COUPLINGS.get(options.get("coupling", "")),
        args=", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None),
        rows=_seed_rows(model),
        **about,
    )


def public_name(dataset: str | None) -> str | None:
    """A dataset's name in cards: a Hub dataset by its repo, local shards without their path."""
    if dataset and dataset.startswith(HUB_SCHEME):
        return HubDataset.parse(dataset).repo
    return "webdataset shards" if dataset and dataset.startswith(SHARD_SCHEME) else dataset


def _metadata(model: Head, repo_id: str, license: str, base: str | None) -> ModelCardData:
    dataset, results = public_name(model.info.get("dataset")), list[EvalResult]()
    measured = accuracies(model.info.get("metrics") or {}).items() if dataset else ()
    for mode, top1 in list(measured)[:1]:  # one for the task, as the loaded model answers; the text has all modes
        data: dict[str, Any] = {"dataset_type": dataset, "dataset_name": dataset, "dataset_split": "test"}
        data |= {"metric_type": "accuracy", "metric_name": MODES[mode], "metric_value": top1}
        results.append(EvalResult(task_type="image-classification", **data))
    return ModelCardData(
        library_name=HUB_LIBRARY,
        license=license,
        pipeline_tag="image-classification",
        tags=TAGS,
        base_model=base,
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"] if results else None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
    )


def _seed_rows(model: Head) -> list[dict[str, Any]]:
    """Accuracy per seed: this model's, and the manifest's for the same head with other seeds."""
    info = model.info
    measured = {info.get("seed", 1): info["metrics"]} if info.get("metrics") else {}
    for head in trained_heads().values():
        if (head.model, head.dataset, head.shots) == (model.architecture, info.get("dataset"), info.get("shots")):
            measured.setdefault(head.seed, head.metrics)
    missing = dict.fromkeys(MODES, "not measured")
    return [{"seed": seed, **missing, **accuracies(metrics)} for seed, metrics in sorted(measured.items())]


LICENSE = "apache-2.0"
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

    def entry(self, revision: str) -> dict[str, Any]:
        """The entry in the manifest, pinned to a revision; a bundled head stays bundled."""
        return {
            "status": "bundled" if self.head.status == "bundled" else "published",
            "org": self.repo_id.split("/")[0],
            "revision": revision,
            "sha256": self.sha256,
            "license": self.license,
            "metrics": self.info.get("metrics", {}),
        }


def prepare(folder: str | Path, org: str, license: str = LICENSE) -> Release:
    """Check a checkpoint folder, written by training for one of the registry's heads, as strictly as loading does, and
    build its card in memory. `org` is an organisation or user on the Hub, and `license` that of the trained weights."""
    folder = Path(folder)
    with warnings.catch_warnings(), skip_init():
        warnings.simplefilter("ignore")  # CLIP has no weights: nothing is downloaded, and none are drawn
        model = create_model(f"local-dir:{folder}", False)
    load_head(model, folder)
    model.info = resolve(f"local-dir:{folder}").info
    head = entry_of(model, folder)
    repo_id, weights = f"{org}/{head.name}", folder / WEIGHTS_NAME
    card = make_card(model, repo_id, license, weights.stat().st_size, (folder / ONNX_FILES["float32"]).exists())
    return Release(folder, head, repo_id, sha256_of(weights), card, model.info, license)


def entry_of(model: Head, folder: Path) -> HeadEntry:
    if not model.is_coupled:
        raise ZooError(f"{folder} is a head of {model.method}: the zoo has heads of dcp only. {ANY_HEAD}")
    try:
        dataset, shots, seed = (model.info[name] for name in ("dataset", "shots", "seed"))
        return get_head(f"{model.architecture}.{dataset}-{shots}shot" + (f"-seed{seed}" if seed != 1 else ""))
    except (KeyError, ZooError) as error:
        raise ZooError(f"{folder} is not one of the zoo's heads, by dataset, shots and seed. {ANY_HEAD}") from error


def publish(release: Release) -> str:
    """Write the card into the folder, upload it with the checkpoint, and return the commit."""
    release.card.save(release.folder / CARD_NAME)
    return upload(release.folder, release.repo_id)


def export_hub(
    model: Head, folder: str | Path, *, precision: str = "float32", calibration: Calibration | None = None
) -> Path:
    """Write a folder with the files of a repo on the Hub that other clients read, too: optimum and transformers.js.
    ZooError as of `export`, and for a folder that is not empty or not writable, or images that are not resized by their
    short side and cropped in the centre.

    Args:
        model: with stored statistics; float32, on the CPU.
        folder: created; must not exist, or be empty. It is a checkpoint, with a model card, `preprocessor_config.json`
            and `onnx/model.onnx`, which contains CLIP's image tower.
        precision, calibration: of a second ONNX file, as in `export`: "float16" or "int8", and images for that.
    """
    folder = Path(folder)
    check_empty(folder)
    with writing_to(folder), unfinished(folder) as new:
        _write_repo(model, new, "ORG/NAME", LICENSE, True, precision=precision, calibration=calibration)
        new.replace(folder)
    return folder


def push_to_hub(model: Head, repo_id: str, *, private: bool = False, license: str = LICENSE, onnx: bool = False) -> str:
    """Upload a model's head, of any dataset, with a model card. ZooError if the Hub refuses the upload or
    cannot be reached.

    Args:
        model: only its trained tensors are uploaded, never CLIP, unless `onnx`.
        repo_id: "org/name"; created if needed.
        private: whether a new repo is private.
        license: of the trained weights, as an identifier of the Hub.
        onnx: whether to upload what `export_hub` writes, CLIP's image tower included.

    Returns:
        The commit: `create_model(f"hf-hub:{repo_id}@{commit}", pretrained=True)` loads exactly this upload.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_repo(model, folder, repo_id, license, onnx)
        return upload(folder, repo_id, private)


def _write_repo(model: Head, folder: Path, repo_id: str, license: str, onnx: bool, **variant: Any) -> None:
    info = dict(model.info)
    if str(info.get("dataset")).startswith(SHARD_SCHEME):  # holds a local path
        info["dataset"] = public_name(info["dataset"])
    model.save_pretrained(folder, **info)
    if onnx:
        write_client_files(model, folder, **variant)
    make_card(model, repo_id, license, (folder / WEIGHTS_NAME).stat().st_size, onnx).save(folder / CARD_NAME)


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload the files of a checkpoint folder in one commit, and return that; what the Hub already has makes none."""
    api = HfApi(library_name=HUB_LIBRARY)

    def send() -> str:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, PREPROCESSOR, *ONNX_FILES.values()],
            commit_message="Upload a head with dcp_zoo",
        ).oid

    with explained(repo_id):
        return retried(send)


def pin(entries: dict[str, dict[str, Any]]) -> bool:
    """Write heads' entries, by name, into the manifest of a source checkout; False for an installed package."""
    if not (MANIFEST.parents[2] / "setup.cfg").is_file() or not os.access(MANIFEST.parent, os.W_OK):
        return False
    write_file(MANIFEST, json.dumps(json.loads(MANIFEST.read_text()) | entries, indent=1) + "\n", "")
    for cached in (trained_heads, all_heads):
        cached.cache_clear()
    return True


CLAIM_TOLERANCE = 0.05  # points; accuracies are stated to a hundredth


@dataclass(frozen=True)
class Claim:
    """A claimed top-1 accuracy in percent and the one that was measured, with one stats; and the coupling of a DCP."""

    head: str
    stats: str
    claimed: float
    measured: float
    coupling: str = ""

    @property
    def holds(self) -> bool:
        return round(abs(self.claimed - self.measured), 6) <= CLAIM_TOLERANCE


def verify(name: str, data_root: Path | None = None, **options: Any) -> list[Claim]:
    """Measure a head by its name, folder, or hf-hub:ORG/REPO, with every stats of its card; see `measured`."""
    model = create_model(name, True)
    if not (claims := claimed(name, model)):
        raise ZooError(f"{name} claims no accuracy: there is nothing to verify.")
    found = measured(name, model, data_root, **options)
    coupling = model.method_config()[0].get("coupling", "")
    return [Claim(name, stats, value, found.get(stats, math.nan), coupling) for stats, value in claims.items()]


def measured(
    name: str,
    model: Head,
    data_root: Path | None = None,
    *,
    device: str = "auto",
    workers: int = 0,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Top-1 in percent by the stats that a head, called `name` in messages, has on the test images of its dataset."""
    if not (dataset := model.info.get("dataset")):
        raise ZooError(f"{name} does not store its dataset: measure it with dcp-zoo eval --dataset NAME.")
    split = training_split(load_labelled(dataset, data_root), model.info.get("test_share"))
    if not split.test:
        raise ZooError(f"{name} was trained on all images of {dataset}: none are left to measure it on.")
    if split.sha256 != model.info.get("split_sha256"):
        hashes = f"its sha256 is {model.info.get('split_sha256')}, and that of the one here is {split.sha256}"
        raise ZooError(f"{name} was trained on another split of {dataset}: {hashes}.")
    source = image_source(model.to(pick_device(device)), split.test, "none", workers, progress)
    batch_size = model.info.get("recipe", {}).get("eval_batch_size", 16)
    return accuracies(measure(source, batch_size, progress)[0])


def claimed(name: str, model: Head) -> dict[str, float]:
    """Top-1 accuracies by stats, of the manifest or the checkpoint; what a head's card states comes first."""
    kind, place, tag = parse_name(name)
    card = download_file(place, CARD_NAME, tag or None, None) if kind == "hf-hub" else Path(place) / CARD_NAME
    data = ModelCard.load(card).data if card.is_file() else ModelCardData()
    stated = {result.metric_name: result.metric_value for result in data.eval_results or []}
    metrics = get_head(name).metrics if kind == "zoo" and tag else model.info.get("metrics") or {}
    return accuracies(metrics) | {mode: stated[name] for mode, name in MODES.items() if name in stated}
