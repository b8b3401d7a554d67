"""Publish a trained head to the Hub, with its model card, and pin it in the manifest."""

import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from dcp_zoo.data.table import HUB_SCHEME, SHARD_SCHEME
from dcp_zoo.data.tables import HubDataset
from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of, write_atomically
from dcp_zoo.hub_errors import explained, retried
from dcp_zoo.model.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.model.dcp import DCP, load_head
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import HUB_ORG, MANIFEST, MODELS, HeadEntry, all_heads, get_head, trained_heads

CARD_NAME = "README.md"
BENCHMARK = f"{HUB_ORG}/few-shot"
EVAL_RESULTS = ".eval_results"  # the folder of a Hub repo with results that the Hub itself shows
TEMPLATE = Path(__file__).parent / "model_card.md"
ELSEWHERE = "Upload other heads with dcp_zoo.push_to_hub(model, 'ORG/NAME')."
LICENSE = "apache-2.0"
TAGS = ["image-classification", "few-shot", "prompt-learning", "clip", "open_clip", "timm", "dcp"]
STATS = ("stored", "batch")
CARD_INFO = ("dataset", "shots", "seed", "recipe", "split_sha256", "subset_sha256", "converted_from")


@dataclass(frozen=True)
class Release:
    """A checkpoint folder that has passed the checks for the Hub.

    Attributes:
        head: its entry in the registry.
        card: its model card.
        info: what the checkpoint stores about its training.
    """

    folder: Path
    head: HeadEntry
    repo_id: str
    sha256: str
    card: ModelCard
    info: dict[str, Any]
    license: str

    @property
    def metrics(self) -> dict[str, Any]:
        return self.info.get("metrics", {})

    def entry(self, revision: str) -> dict[str, Any]:
        """Its entry in the manifest, pinned to a revision; a bundled head stays bundled."""
        return {
            "status": "bundled" if self.head.status == "bundled" else "published",
            "org": self.repo_id.split("/")[0],
            "revision": revision,
            "sha256": self.sha256,
            "license": self.license,
            "metrics": self.metrics,
        }


def prepare(folder: str | Path, org: str, license: str = LICENSE) -> Release:
    """Check a checkpoint folder as strictly as loading does, and build its card in memory.

    Args:
        folder: written by training, for one of the registry's heads.
        org: organisation or user on the Hub.
        license: of the trained weights, as an identifier of the Hub.

    Raises:
        ZooError: not a valid checkpoint, or a head that is not in the registry.
    """
    folder = Path(folder)
    model = load_checked(folder)
    head = head_of(model, folder)
    repo_id = f"{org}/{head.name}"
    card = make_card(model, repo_id, license, f"{(folder / WEIGHTS_NAME).stat().st_size / 1e6:.1f} MB")
    return Release(folder, head, repo_id, sha256_of(folder / WEIGHTS_NAME), card, dict(model.info), license)


def publish(release: Release) -> str:
    """Write the card and the results into the folder, upload them with the checkpoint, and return the commit.

    Raises:
        ZooError: the Hub refuses the upload or cannot be reached.
    """
    release.card.save(release.folder / CARD_NAME)
    write_results(release.folder, release.head.dataset, release.head.tag, release.metrics)
    return upload(release.folder, release.repo_id)


def collect(release: Release, title: str) -> None:
    """Add a published head to a collection of its organisation, which is created if needed."""
    api = HfApi(library_name="dcp_zoo")

    def add() -> None:
        org = release.repo_id.split("/")[0]
        slug = api.create_collection(title, namespace=org, exists_ok=True).slug
        api.add_collection_item(slug, release.repo_id, "model", exists_ok=True)

    with explained(release.repo_id):
        retried(add)


def pin(entries: dict[str, dict[str, Any]], manifest: Path = MANIFEST) -> bool:
    """Write heads' entries, by name, into the manifest of a source checkout; False for an installed package."""
    if not (manifest.parents[2] / "setup.cfg").is_file() or not os.access(manifest.parent, os.W_OK):
        return False
    entries = json.loads(manifest.read_text()) | entries
    text = json.dumps(entries, indent=1) + "\n"
    write_atomically(manifest, lambda temporary: Path(temporary).write_text(text))
    for cached in (trained_heads, all_heads):
        cached.cache_clear()
    return True


def push_to_hub(model: DCP, repo_id: str, *, private: bool = False, license: str = LICENSE) -> str:
    """Upload a model's head, of any dataset, with a model card.

    Args:
        model: only its trained tensors are uploaded, never CLIP.
        repo_id: "org/name"; created if needed.
        private: whether a new repo is private.
        license: of the trained weights, as an identifier of the Hub.

    Returns:
        The commit: `create_model(f"hf-hub:{repo_id}@{commit}", pretrained=True)` loads exactly this upload.

    Raises:
        ZooError: the Hub refuses the upload or cannot be reached.
    """
    info = dict(model.info)
    if str(info.get("dataset")).startswith(SHARD_SCHEME):  # holds a local path
        info["dataset"] = public_name(info["dataset"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = model.save_pretrained(temporary, **info)
        size = f"{(folder / WEIGHTS_NAME).stat().st_size / 1e6:.1f} MB"
        make_card(model, repo_id, license, size).save(folder / CARD_NAME)
        return upload(folder, repo_id, private)


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload the files of a checkpoint folder in one commit, and return that commit.

    A busy Hub is asked again. A folder that the Hub already has makes no new commit.
    """
    api = HfApi(library_name="dcp_zoo")

    def send() -> str:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, f"{EVAL_RESULTS}/*"],
            commit_message="Upload a head with dcp_zoo",
        ).oid

    with explained(repo_id):
        return retried(send)


def load_checked(folder: Path) -> DCP:
    """The folder's head, checked and loaded into a model whose CLIP has random weights: nothing is downloaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing weights: `load_head` loads them
        model = create_model(f"local-dir:{folder}", False)
    return load_head(model, folder) if isinstance(model, DCP) else model  # other heads are loaded as they are built


def head_of(model: DCP, folder: Path) -> HeadEntry:
    """The registry's entry for a checkpoint; ZooError if there is none."""
    if model.method != "dcp":
        raise ZooError(f"{folder} is a head of {model.method}: the zoo's heads are those of dcp. {ELSEWHERE}")
    try:
        dataset, shots, seed = (model.info[name] for name in ("dataset", "shots", "seed"))
        return get_head(f"{model.architecture}.{dataset}-{shots}shot" + (f"-seed{seed}" if seed != 1 else ""))
    except (KeyError, ZooError) as error:
        raise ZooError(f"{folder} is not one of the zoo's heads, by dataset, shots and seed. {ELSEWHERE}") from error


# ------------------------------------------------------------------------------------------------------- the model card


def make_card(model: DCP, repo_id: str, license: str, size: str) -> ModelCard:
    """The model card: metadata for the Hub, and what a reader needs to use and assess the head."""
    spec = MODELS.get(model.architecture)
    base = spec.clip_repo if spec and model.clip_source == spec.clip_pretrained else None
    options = model.method_config()[0]
    return ModelCard.from_template(
        card_data(model, repo_id, license, base),
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        size=size,
        architecture=model.architecture,
        base=base,
        clip=model.clip_source,
        num_classes=model.num_classes,
        method=model.method,
        args=", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None),
        rows=seed_rows(model),
        **{name: model.info.get(name) for name in CARD_INFO} | {"dataset": public_name(model.info.get("dataset"))},
    )


def public_name(dataset: str | None) -> str | None:
    """A dataset's name in cards: a Hub dataset by its repo, local shards without their path."""
    if dataset and dataset.startswith(HUB_SCHEME):
        return HubDataset.parse(dataset).repo
    return "webdataset shards" if dataset and dataset.startswith(SHARD_SCHEME) else dataset


def card_data(model: DCP, repo_id: str, license: str, base: str | None) -> ModelCardData:
    """The card's metadata for the Hub."""
    dataset, metrics = public_name(model.info.get("dataset")), model.info.get("metrics", {})
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"top-1, {stats} statistics",
            metric_value=metrics[f"top1_{stats}"],
        )
        for stats in STATS
        if dataset and f"top1_{stats}" in metrics
    ]
    return ModelCardData(
        library_name="dcp_zoo",
        license=license,
        pipeline_tag="image-classification",
        tags=TAGS,
        base_model=base,
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"] if results else None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
    )


def write_results(folder: Path, dataset: str, task: str, metrics: dict[str, Any]) -> None:
    """Write `.eval_results/DATASET.yaml`: accuracies in the format that the Hub reads for its own result pages. The
    Hub's field for the benchmark's repo names `BENCHMARK`, and the task is the head's tag."""
    entries = [
        {
            "dataset": {"id": BENCHMARK, "task_id": task},
            "value": metrics[f"top1_{stats}"],
            "notes": f"top-1 accuracy in percent on the test images of {dataset}, {stats} statistics",
        }
        for stats in STATS
        if f"top1_{stats}" in metrics
    ]
    if entries:
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        (folder / EVAL_RESULTS / f"{dataset}.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))


def seed_rows(model: DCP) -> list[dict[str, Any]]:
    """Accuracy per seed: this model's, and the manifest's for the same head with other seeds."""
    info = model.info
    measured = {info.get("seed", 1): info["metrics"]} if info.get("metrics") else {}
    for head in trained_heads().values():
        if (head.model, head.dataset, head.shots) == (model.architecture, info.get("dataset"), info.get("shots")):
            measured.setdefault(head.seed, head.metrics)
    return [
        {"seed": seed} | {stats: metrics.get(f"top1_{stats}", "not measured") for stats in STATS}
        for seed, metrics in sorted(measured.items())
    ]
