"""Heads to the Hub: the model card, and the upload with it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from dcp_zoo.data.specs import HUB_SCHEME, SHARD_SCHEME
from dcp_zoo.data.tables import HubDataset
from dcp_zoo.deploy.hub_files import ONNX_FILES, PREPROCESSOR, write_client_files
from dcp_zoo.deploy.quantize import Calibration
from dcp_zoo.errors import writing_to
from dcp_zoo.files import check_empty, unfinished
from dcp_zoo.hub import HUB_LIBRARY, explained, retried
from dcp_zoo.model.config import CONFIG_NAME, COUPLINGS, WEIGHTS_NAME
from dcp_zoo.model.head import Head
from dcp_zoo.training.recipes import NO_CLASSIFIER
from dcp_zoo.zoo.registry import MODELS, trained_heads

CARD_NAME = "README.md"
LICENSE = "apache-2.0"
CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
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
