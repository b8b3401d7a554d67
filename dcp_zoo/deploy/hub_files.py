"""What other clients of the Hub read beside a head: optimum with transformers, and transformers.js. They are told to
scale pixels to [0, 1] alone: no two of them resize alike, so that the ONNX file resizes, crops and normalises."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dcp_zoo.answers import log_softmax
from dcp_zoo.deploy.export import TOLERANCES, compare_probabilities, export, with_preprocessing
from dcp_zoo.deploy.onnx_classifier import INPUT, OnnxClassifier
from dcp_zoo.deploy.quantize import Calibration
from dcp_zoo.files import write_file
from dcp_zoo.model.config import CONFIG_NAME
from dcp_zoo.model.head import Head

PREPROCESSOR = "preprocessor_config.json"
ONNX_FILES = {  # by precision, as transformers.js names them
    "float32": "onnx/model.onnx",
    "float16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
}


def write_client_files(
    model: Head, folder: Path, precision: str = "float32", calibration: Calibration | None = None
) -> None:
    """Add to a model's checkpoint what other clients read: ONNX files in float32 and in `precision`, a
    `preprocessor_config.json`, and fields of `config.json`. ZooError as of `export` and `with_preprocessing`."""
    for kind in dict.fromkeys(("float32", precision)):
        path = folder / ONNX_FILES[kind]
        export(model, path, precision=kind, calibration=calibration if kind == "int8" else None)
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
