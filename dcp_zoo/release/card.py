"""The model card of a head, and its accuracies: written for the Hub, and read again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dcp_zoo.data.table import HUB_SCHEME, SHARD_SCHEME
from dcp_zoo.data.tables import HubDataset
from dcp_zoo.model.head import Head
from dcp_zoo.training.recipes import NO_CLASSIFIER
from dcp_zoo.zoo.hub import HUB_LIBRARY
from dcp_zoo.zoo.registry import MODELS, trained_heads

CARD_NAME = "README.md"
CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
CARD_INFO = ("dataset", "shots", "seed", "recipe", "split_sha256", "subset_sha256", "converted_from")
TAGS = ["image-classification", "few-shot", "prompt-learning", "clip", "open_clip", "timm", "dcp"]
MODES = {  # of an accuracy, and their names in a card
    "stored": "top-1, stored statistics",
    "batch": "top-1, batch statistics",
    NO_CLASSIFIER: "top-1, without the classifier stage",
}


def accuracies(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 accuracy in percent by mode, of the metrics in a config.json or the manifest."""
    return {mode: metrics[f"top1_{mode}"] for mode in MODES if f"top1_{mode}" in metrics}


def card_accuracies(card: Path) -> dict[str, float]:
    """Top-1 accuracy in percent by mode, as the metadata of a card state it."""
    stated = {result.metric_name: result.metric_value for result in ModelCard.load(card).data.eval_results or []}
    return {mode: stated[name] for mode, name in MODES.items() if name in stated}


def make_card(model: Head, repo_id: str, license: str, size: int) -> ModelCard:
    """The model card of a head whose weights have `size` bytes: metadata for the Hub, and what a reader needs to use
    and assess it."""
    spec = MODELS.get(model.architecture)
    base = spec.clip_repo if spec and model.clip_source == spec.clip_pretrained else None
    options, _ = model.method_config()
    info = {name: model.info.get(name) for name in CARD_INFO}
    return ModelCard.from_template(
        _metadata(model, repo_id, license, base),
        template_path=str(CARD_TEMPLATE),
        repo_id=repo_id,
        size=f"{size / 1e6:.1f} MB",
        architecture=model.architecture,
        base=base,
        clip=model.clip_source,
        num_classes=model.num_classes,
        method=model.method,
        args=", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None),
        rows=_seed_rows(model),
        **info | {"dataset": public_name(info["dataset"])},
    )


def public_name(dataset: str | None) -> str | None:
    """A dataset's name in cards: a Hub dataset by its repo, local shards without their path."""
    if dataset and dataset.startswith(HUB_SCHEME):
        return HubDataset.parse(dataset).repo
    return "webdataset shards" if dataset and dataset.startswith(SHARD_SCHEME) else dataset


def _metadata(model: Head, repo_id: str, license: str, base: str | None) -> ModelCardData:
    dataset = public_name(model.info.get("dataset"))
    measured = accuracies(model.info.get("metrics") or {}).items()
    results = [  # one for the task, as the loaded model answers; the card's text has all modes
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=MODES[mode],
            metric_value=top1,
        )
        for mode, top1 in list(measured)[:1]
        if dataset
    ]
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
