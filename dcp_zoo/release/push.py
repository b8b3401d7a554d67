"""The files of a head's repo on the Hub, and their upload; also what optimum with transformers, and transformers.js
read. They are told to scale pixels to [0, 1] alone: no two resize alike, so that the ONNX file does that."""

import json
import tempfile
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from PIL import Image

from dcp_zoo.answers import log_softmax
from dcp_zoo.deploy.export import TOLERANCES, compare_probabilities, export, with_preprocessing
from dcp_zoo.deploy.onnx_classifier import INPUT, OnnxClassifier
from dcp_zoo.errors import writing_to
from dcp_zoo.files import check_empty, unfinished, write_file
from dcp_zoo.hub import HUB_LIBRARY, explained, retried
from dcp_zoo.model.config import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.model.head import Head
from dcp_zoo.release.cards import CARD_NAME, make_card

LICENSE = "apache-2.0"
PREPROCESSOR = "preprocessor_config.json"
ONNX_FILES = {"float32": "onnx/model.onnx", "float16": "onnx/model_fp16.onnx"}  # as transformers.js names them


def export_hub(model: Head, folder: str | Path, *, precision: str = "float32") -> Path:
    """Write a folder with the files of a repo on the Hub that other clients read, too: optimum and transformers.js.
    ZooError as of `export`, `with_preprocessing` and `make_card`, and for a folder that is not empty or not writable.

    Args:
        model: with stored statistics; float32, on the CPU.
        folder: created; must not exist, or be empty. It is a checkpoint, with a model card, `preprocessor_config.json`
            and `onnx/model.onnx`, which contains CLIP's image tower.
        precision: "float16" adds a second ONNX file.
    """
    folder = Path(folder)
    check_empty(folder)
    with writing_to(folder), unfinished(folder) as new:
        _write_repo(model, new, "ORG/NAME", LICENSE, True, precision)
        new.replace(folder)
    return folder


def push_to_hub(model: Head, repo_id: str, *, private: bool = False, license: str = LICENSE, onnx: bool = False) -> str:
    """Upload a model's head, of any dataset, with a model card. ZooError as of `make_card`, or if the Hub refuses it or
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


def _write_repo(model: Head, folder: Path, repo_id: str, license: str, onnx: bool, precision: str = "float32") -> None:
    model.save_pretrained(folder)
    if onnx:
        write_client_files(model, folder, precision)
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


def write_client_files(model: Head, folder: Path, precision: str = "float32") -> None:
    """Add to a model's checkpoint what other clients read: ONNX files in float32 and in `precision`, a
    `preprocessor_config.json`, and fields of `config.json`. ZooError as of `export` and `with_preprocessing`."""
    for kind in dict.fromkeys(("float32", precision)):
        path = folder / ONNX_FILES[kind]
        export(model, path, precision=kind)
        _take_any_size(path, kind)
    cfg = model.pretrained_cfg
    _, height, width = cfg["input_size"]
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        **dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), False),  # part of the ONNX file
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": int(height / cfg["crop_pct"])},
        "resample": 3,  # bicubic
        "crop_size": {"height": height, "width": width},
        "image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),
    }
    names = model.classnames
    config = json.loads((folder / CONFIG_NAME).read_text()) | {
        "model_type": "vit",  # of the types for which both clients classify images, the one that says least
        "transformers_weights": "none-but-the-onnx-file.safetensors",  # or transformers loads random ones
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    for name, content in ((PREPROCESSOR, preprocessor), (CONFIG_NAME, config)):
        write_file(folder / name, json.dumps(content, indent=1) + "\n")


def _take_any_size(path: Path, precision: str) -> None:
    """Replace an exported file by one from `INPUT` (B, 3, any height, any width), RGB in [0, 1], to logits (B, C)."""
    import onnx
    import onnxruntime

    plain = OnnxClassifier(path)
    model = with_preprocessing(onnx.load(path), plain.info["preprocessing"], "rgb")
    rgb = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = [INPUT if name == rgb else name for name in node.input]
    model.graph.input[0].name = INPUT
    del model.graph.output[1:], model.metadata_props[:]
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def probabilities(image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
        return np.exp(log_softmax(session.run(["logits"], {INPUT: pixels})[0]))

    compare_probabilities(probabilities, plain, TOLERANCES[precision])
