"""Heads on the Hub: the files of their repos, with model cards, and their upload.

With an ONNX file, a repo also works with transformers and optimum in Python, and with transformers.js. Their
image processors only scale pixels to [0, 1]: no two of them resize alike, so the ONNX file resizes.
"""

import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, constants

from dcp_zoo.data.packaged import DATASETS, classnames
from dcp_zoo.data.splits import split_sha256
from dcp_zoo.errors import ZooError, writing_to
from dcp_zoo.fields import Values
from dcp_zoo.files import check_empty, write_file
from dcp_zoo.heads.config import CONFIG_NAME, COUPLINGS, NO_CLASSIFIER, WEIGHTS_NAME, accuracy_text
from dcp_zoo.heads.head import Head
from dcp_zoo.hub import HUB_LIBRARY, check_connection, download_file, explained
from dcp_zoo.pages import templates
from dcp_zoo.promises import trust_note
from dcp_zoo.release.onnx import export, take_any_size
from dcp_zoo.zoo.registry import get_head, newest
from dcp_zoo.zoo.resolve import parse_name
from dcp_zoo.zoo.specs import MODELS

CARD_NAME = "README.md"
MODES = ("stored", "batch", NO_CLASSIFIER)  # of an accuracy


def accuracies(metrics: Values) -> dict[str, float]:
    """Top-1 accuracy in percent by mode, of the metrics in a config.json or the manifest."""
    return {mode: metrics[f"top1_{mode}"] for mode in MODES if f"top1_{mode}" in metrics}


def make_card(
    model: Head, repo_id: str, license: str, size: int, onnx: bool = False, others: Values | None = None
) -> ModelCard:
    """The model card of a head whose weights have `size` bytes; `onnx`: the repo has an ONNX file for other
    clients; `others`: top-1 accuracies of other protocols, by name.
    ZooError for a head with an accuracy that is not of the dataset that it names, see `not_of_dataset`."""
    info = model.info
    problem = not_of_dataset(model)
    if problem and info.get("metrics"):
        raise ZooError(problem)
    dataset = None if problem or info.get("dataset") == "folder" else info.get("dataset")
    spec = MODELS.get(model.encoder.architecture)
    base = spec.clip_repo if spec and model.encoder.source == spec.clip_pretrained else None
    return ModelCard.from_template(
        ModelCardData(),  # the template has it
        template_path=str(Path(__file__).parent / "model_card.md"),
        model=model,
        info=info,
        spec=spec,
        base=base,
        repo_id=repo_id,
        license=license,
        library=HUB_LIBRARY,
        size=size,
        onnx=onnx,
        others=others,
        trust=trust_note(info),
        told=accuracy_text(info),
        dataset=dataset,
        data=DATASETS.get(dataset or ""),
        couplings=COUPLINGS,
        top1=accuracies(info.get("metrics") or {}),
    )


def not_of_dataset(model: Head) -> str:
    """Why a head must not be published under the name of the dataset that it names; "" if it may, or names
    none of the table. Its classes, split and test images must be that dataset's, as far as the package knows
    them."""
    info = model.info
    name = info.get("dataset") or ""
    spec = DATASETS.get(name)
    if spec is None or spec.num_classes is None:
        return ""
    split = split_sha256(name)
    others = []
    if spec.names and sorted(model.classes) != sorted(classnames(name)):
        others.append("classes")
    if split and info.get("split_sha256") != split:
        others.append("split")
    if spec.counts and info.get("test_images") not in (None, spec.counts[2]):
        others.append("test images")
    if not others:
        return ""
    return (
        f"This head cannot be published as one of {name}, which has other {', '.join(others)}. Train it on the whole "
        "dataset, or on these images as a folder: dcp-zoo train FOLDER."
    )


def holds(claimed: float, measured: float) -> bool:
    """Whether a top-1 accuracy in percent is the claimed one, within 0.05 points: they are stated to a
    hundredth."""
    return round(abs(claimed - measured), 6) <= 0.05


def claimed(name: str, model: Head) -> dict[str, float]:
    """Top-1 accuracies in percent by mode, of the manifest or the checkpoint; what a head's card states
    comes first. ZooError for none."""
    kind, place, tag = parse_name(name)
    claims = accuracies(model.info.get("metrics") or {})
    if kind == "zoo":
        card = None
        claims |= accuracies(newest(get_head(f"{place}.{tag}")).metrics) if tag else {}
    else:
        card = download_file(place, CARD_NAME, tag or None) if kind == "hf-hub" else Path(place) / CARD_NAME
    results = ModelCard.load(card).data.eval_results if card and card.is_file() else None
    for result in results or []:
        mode = (result.metric_args or {}).get("mode")
        if mode in MODES:
            claims[mode] = result.metric_value
    if not claims:
        raise ZooError(f"{name} claims no accuracy: there is nothing to compare with. Omit --claim.")
    return claims


LICENSE = "apache-2.0"
PREPROCESSOR = "preprocessor_config.json"
ONNX_FILE = "onnx/model.onnx"  # as transformers.js names it, of float32


def export_hub(model: Head, folder: str | Path) -> Path:
    """Write a folder with the files of a repo on the Hub that other clients read, too: optimum and
    transformers.js. ZooError as of `export`, `take_any_size` and `make_card`, and for a folder that is not
    empty or not writable.

    Args:
        model: with stored statistics; float32, on the CPU.
        folder: created; must not exist, or be empty. It is a checkpoint, with a model card,
            `preprocessor_config.json` and `onnx/model.onnx`, which contains CLIP's image tower.
    """
    folder = Path(folder)
    check_empty(folder)
    with tempfile.TemporaryDirectory() as temporary, writing_to(folder):
        _write_repo(model, Path(temporary), "ORG/NAME", LICENSE, True)
        shutil.copytree(temporary, folder, dirs_exist_ok=True)
    return folder


def push_to_hub(model: Head, repo_id: str, *, private: bool = False, license: str = LICENSE, onnx: bool = False) -> str:
    """Upload a model's head, of any dataset, with a model card. ZooError as of `make_card`, or if the Hub
    refuses it or cannot be reached.

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


def _write_repo(model: Head, folder: Path, repo_id: str, license: str, onnx: bool) -> None:
    model.save_pretrained(folder)
    if onnx:
        write_client_files(model, folder)
    make_card(model, repo_id, license, (folder / WEIGHTS_NAME).stat().st_size, onnx).save(folder / CARD_NAME)


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload the files of a checkpoint folder in one commit, and return that; what the Hub already has makes
    none."""
    if "/" not in repo_id:  # which the Hub would create, and then not find
        raise ZooError(f"{repo_id!r} names no organisation or user of the Hub: use ORG/NAME.")
    api = HfApi(library_name=HUB_LIBRARY)
    with explained(repo_id):
        check_connection(constants.ENDPOINT)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, PREPROCESSOR, ONNX_FILE],
            commit_message="Upload a head with dcp_zoo",
        ).oid


def write_client_files(model: Head, folder: Path) -> None:
    """Add to a model's checkpoint what other clients read: an ONNX file, a `preprocessor_config.json`, and
    fields of `config.json`. ZooError as of `export` and `take_any_size`."""
    take_any_size(export(model, folder / ONNX_FILE))
    preprocessor = templates(__package__).get_template(f"{PREPROCESSOR}.jinja").render(cfg=model.pretrained_cfg)
    write_file(folder / PREPROCESSOR, preprocessor)
    config = json.loads((folder / CONFIG_NAME).read_text()) | {
        "model_type": "vit",  # of the types for which both clients classify images, the one that says least
        "transformers_weights": "none-but-the-onnx-file.safetensors",  # or transformers loads random ones
        "id2label": dict(enumerate(model.classnames)),
        "label2id": {name: i for i, name in enumerate(model.classnames)},
    }
    write_file(folder / CONFIG_NAME, json.dumps(config, indent=1) + "\n")
