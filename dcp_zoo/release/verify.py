"""What a head's card claims, measured again."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dcp_zoo.data import load_labelled, training_split
from dcp_zoo.errors import ZooError
from dcp_zoo.hub import download_file
from dcp_zoo.model.head import Head
from dcp_zoo.release.push import CARD_NAME, MODES, accuracies
from dcp_zoo.training.device import pick_device
from dcp_zoo.training.evaluation import measure
from dcp_zoo.training.sources import Progress, image_source, no_progress
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import get_head
from dcp_zoo.zoo.resolve import parse_name

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
