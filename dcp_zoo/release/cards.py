"""What a head's model card says."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dcp_zoo.data.packaged import classnames, split_sha256
from dcp_zoo.data.specs import DATASETS, is_own
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.hub import HUB_LIBRARY, download_file
from dcp_zoo.model.classes import read_of
from dcp_zoo.model.config import COUPLINGS, NO_CLASSIFIER
from dcp_zoo.model.head import Head
from dcp_zoo.zoo.registry import MODELS, get_head, trained_heads
from dcp_zoo.zoo.resolve import parse_name

CARD_NAME = "README.md"
CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
TAGS = ["image-classification", "few-shot", "prompt-learning", "clip", "open_clip", "timm", "dcp"]
MODES = {  # of an accuracy, and their names in a card
    "stored": "top-1, stored statistics",
    "batch": "top-1, batch statistics",
    NO_CLASSIFIER: "top-1, without the text probe",
}
PROBED = {mode: f"{name}, with a text probe" for mode, name in MODES.items() if mode != NO_CLASSIFIER}


def accuracies(metrics: Values) -> dict[str, float]:
    """Top-1 accuracy in percent by mode, of the metrics in a config.json or the manifest."""
    return {mode: metrics[f"top1_{mode}"] for mode in MODES if f"top1_{mode}" in metrics}


def make_card(model: Head, repo_id: str, license: str, size: int, onnx: bool = False) -> ModelCard:
    """The model card of a head whose weights have `size` bytes; `onnx`: the repo has ONNX files for other clients.
    ZooError for a head with an accuracy that is not of the dataset that it names, see `not_of_dataset`."""
    info, problem = model.info, not_of_dataset(model)
    if problem and info.get("metrics"):
        raise ZooError(problem)
    dataset = None if problem or info.get("dataset") == "folder" else info.get("dataset")
    spec = MODELS.get(model.encoder.architecture)
    base = spec.clip_repo if spec and model.encoder.source == spec.clip_pretrained else None
    options, _ = model.method_config()
    about: Values = {"model": model, "info": info, "spec": spec, "options": options, "base": base}
    return ModelCard.from_template(
        _metadata(model, repo_id, license, base, dataset),
        template_path=str(CARD_TEMPLATE),
        repo_id=repo_id,
        size=f"{size / 1e6:.1f} MB",
        onnx=onnx,
        dataset=dataset,
        part_note=DATASETS[dataset].part_note if dataset in DATASETS else "",
        whose=COUPLINGS.get(options.get("coupling", "")),
        args=", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None),
        rows=_seed_rows(model, dataset),
        alone={"dcp": "DCP alone", "text-probe": "zero-shot CLIP"}.get(model.method, f"{model.method} alone"),
        **about,
    )


def not_of_dataset(model: Head) -> str:
    """Why a head must not be published under the name of the dataset that it names; "" if it may, or names none of the
    table. Its classes, split and test images must be that dataset's, as far as the package knows them."""
    info, name = model.info, model.info.get("dataset")
    if name not in DATASETS or is_own(name):
        return ""
    spec, known = DATASETS[name], split_sha256(name)
    tested = spec.counts and info.get("test_images", spec.counts[2])
    if spec.names and sorted(read_of(model.classes)) != sorted(classnames(name)):
        reason = f"its {model.num_classes} classes are not the {spec.num_classes} of {name}"
    elif known and info.get("split_sha256") != known:
        reason = f"it was trained and tested on another split: its sha256 is {info.get('split_sha256')}, not {known}"
    elif spec.counts and tested != spec.counts[2]:
        reason = f"it was tested on {tested:,} images, not on the {spec.counts[2]:,} of {name}"
    else:
        return ""
    advice = f"Train it on {name} as it is, or on these images as a folder: dcp-zoo train FOLDER"
    return f"This head says that it is of {name}, but {reason}. {advice}."


def _metadata(model: Head, repo_id: str, license: str, base: str | None, dataset: str | None) -> ModelCardData:
    results, measured = list[EvalResult](), accuracies(model.info.get("metrics") or {}) if dataset else {}
    names = MODES | PROBED if NO_CLASSIFIER in measured else MODES
    measured.pop("batch", None)  # what the loaded model answers, and the method alone; the text has all modes
    for mode, top1 in measured.items():
        data: Values = {"dataset_type": dataset, "dataset_name": dataset, "dataset_split": "test"}
        data |= {"metric_type": "accuracy", "metric_name": names[mode], "metric_value": top1}
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


def _seed_rows(model: Head, dataset: str | None) -> list[Values]:
    """Accuracy per seed: this model's, and for DCP with a text probe the manifest's for the same head with other
    seeds."""
    info = model.info
    measured = {info.get("seed", 1): info["metrics"]} if info.get("metrics") else {}
    same = model.encoder.architecture, dataset, info.get("shots")
    for head in trained_heads().values() if model.method == "dcp" and model.text_probe else ():
        if (head.model, head.dataset, head.shots) == same:
            measured.setdefault(head.seed, head.metrics)
    missing = dict.fromkeys(MODES, "not measured")
    return [{"seed": seed, **missing, **accuracies(metrics)} for seed, metrics in sorted(measured.items())]


def holds(claimed: float, measured: float) -> bool:
    """Whether a top-1 accuracy in percent is the claimed one, within 0.05 points: they are stated to a hundredth."""
    return round(abs(claimed - measured), 6) <= 0.05


def claimed(name: str, model: Head) -> dict[str, float]:
    """Top-1 accuracies in percent by mode, of the manifest or the checkpoint; what a head's card states comes first.
    ZooError for none."""
    kind, place, tag = parse_name(name)
    card = download_file(place, CARD_NAME, tag or None, None) if kind == "hf-hub" else Path(place) / CARD_NAME
    data = ModelCard.load(card).data if card.is_file() else ModelCardData()
    stated = {result.metric_name: result.metric_value for result in data.eval_results or []}
    metrics = (get_head(name).metrics if kind == "zoo" and tag else {}) or model.info.get("metrics") or {}
    found = accuracies(metrics)
    for names in (MODES, PROBED):
        found |= {mode: stated[card_name] for mode, card_name in names.items() if card_name in stated}
    if not found:
        raise ZooError(f"{name} claims no accuracy: there is nothing to compare with. Omit --claim.")
    return found
