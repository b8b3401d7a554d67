"""Measure a head again, and compare with what its card claims."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcp_zoo.data import load_labelled, training_split
from dcp_zoo.errors import ZooError
from dcp_zoo.release.card import CARD_NAME, accuracies, card_accuracies
from dcp_zoo.training.device import pick_device
from dcp_zoo.training.evaluation import measure
from dcp_zoo.training.sources import Progress, image_source, no_progress
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.hub import download_file
from dcp_zoo.zoo.registry import get_head, trained_heads
from dcp_zoo.zoo.resolve import parse_name

CLAIM_TOLERANCE = 0.05  # points; accuracies are stated to a hundredth


@dataclass(frozen=True)
class Claim:
    """A claimed top-1 accuracy in percent and the one that was measured, with one stats."""

    head: str
    stats: str
    claimed: float
    measured: float

    @property
    def holds(self) -> bool:
        return round(abs(self.claimed - self.measured), 6) <= CLAIM_TOLERANCE


def bundled() -> list[str]:
    """The heads inside this package."""
    return [name for name, head in trained_heads().items() if head.status == "bundled"]


def verify(name: str, data_root: Path | None = None, **options: Any) -> list[Claim]:
    """Measure a head on the test images of its dataset, with every stats that its card states.

    Args:
        name: a head of the zoo, a checkpoint folder, or hf-hub:ORG/REPO[@REVISION].
        data_root, options: see `measured`.

    Raises:
        ZooError: nothing is claimed, or an error of `measured`.
    """
    model = create_model(name, True)
    claims = claimed(name, model)
    if not claims:
        raise ZooError(f"{name} claims no accuracy: there is nothing to verify.")
    found = measured(name, model, data_root, **options)
    return [Claim(name, stats, value, found.get(stats, math.nan)) for stats, value in claims.items()]


def measured(
    name: str,
    model: Any,
    data_root: Path | None = None,
    *,
    device: str = "auto",
    workers: int = 0,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Top-1 in percent by the stats that a head has, on the test images that it was trained for.

    Args:
        name: for messages.
        model: the head.
        data_root: see `dcp_zoo.data.load_labelled`.
        device, workers, progress: see `dcp_zoo.training.plan`.

    Raises:
        ZooError: the dataset is not stored or not there, or its split is another one.
    """
    dataset = model.info.get("dataset")
    if not dataset:
        raise ZooError(f"{name} does not store its dataset: measure it with dcp-zoo eval --dataset NAME.")
    split = training_split(load_labelled(dataset, data_root), model.info.get("test_share"))
    if not split.test:
        raise ZooError(f"{name} was trained on all images of {dataset}: none are left to measure it on.")
    if split.sha256 != model.info.get("split_sha256"):
        raise ZooError(
            f"{name} was trained on another split of {dataset}: its sha256 is {model.info.get('split_sha256')}, and "
            f"that of the one here is {split.sha256}."
        )
    source = image_source(model.to(pick_device(device)), split.test, "none", workers, progress)
    batch_size = model.info.get("recipe", {}).get("eval_batch_size", 16)
    return accuracies(measure(source, batch_size, progress)[0])


def claimed(name: str, model: Any) -> dict[str, float]:
    """Top-1 accuracies by stats, of the manifest or the checkpoint; what a head's card states comes first."""
    kind, place, tag = parse_name(name)
    card = download_file(place, CARD_NAME, tag or None, None) if kind == "hf-hub" else Path(place) / CARD_NAME
    found = card_accuracies(card) if card.is_file() else {}
    metrics = get_head(name).metrics if kind == "zoo" and tag else model.info.get("metrics") or {}
    return accuracies(metrics) | found
