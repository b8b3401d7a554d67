"""Variants of an exported ONNX file: lower precision, preprocessing inside; each verified against the plain file."""

import json
from typing import Any

import numpy as np
from PIL import Image

from dcp_zoo.data import load_image
from dcp_zoo.data.samples import sample_images
from dcp_zoo.deploy.onnx_classifier import METADATA_KEY, OnnxClassifier, softmax
from dcp_zoo.deploy.onnx_graph import with_float16_weights, with_preprocessing
from dcp_zoo.deploy.quantize import Calibration, quantize
from dcp_zoo.errors import ZooError, check_choice

PREPROCESSING = ("outside", "inside")
PRECISIONS = ("float32", "float16", "int8")
SIZES = ((640, 427), (427, 641), (300, 201), (97, 240))  # of test photographs, width and height
TOLERANCES = {"float32": 1e-3, "float16": 5e-3, "int8": 0.05}  # in probabilities; of int8, for its preprocessing alone


def check_variant(preprocessing: str, precision: str, format: str) -> None:
    """Raise ZooError for an unknown variant, or a format that has none."""
    check_choice("preprocessing", preprocessing, PREPROCESSING)
    check_choice("precision", precision, PRECISIONS)
    if format != "onnx" and (preprocessing, precision) != ("outside", "float32"):
        raise ZooError(f"Only ONNX files have other precisions or preprocessing inside, not {format}: use format onnx.")


def make_variant(path: str, preprocessing: str, precision: str, data: Calibration | None) -> None:
    """Replace a plain float32 file; its metadata name the precision, and what int8 costs.

    Raises:
        ZooError: int8 loses too much accuracy, or the variant's probabilities on test photographs of odd sizes differ
            by more than `TOLERANCES`.
    """
    if (preprocessing, precision) == ("outside", "float32"):
        return
    import onnx

    plain = OnnxClassifier(path)
    info: dict[str, Any] = plain.info | {"precision": precision}
    if precision == "int8":
        if data is None:
            raise ZooError("int8 needs images: pass calibration=dcp_zoo.deploy.quantize.calibration(model, split).")
        info["quantization"] = quantize(path, data)  # this compares top-1
        plain = OnnxClassifier(path)
    model = onnx.load(path)
    if precision == "float16":
        model = with_float16_weights(model)
    if preprocessing == "inside":
        model = with_preprocessing(model, info["preprocessing"])
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(info)})
    onnx.save(model, path)
    _compare(OnnxClassifier(path), plain, TOLERANCES[precision])


def _compare(variant: OnnxClassifier, plain: OnnxClassifier, tolerance: float) -> None:
    photographs = [load_image(path) for path in sample_images()]
    for i, size in enumerate(SIZES):
        image = photographs[i % len(photographs)].resize(size, Image.Resampling.BICUBIC)
        expected = softmax(plain(plain.preprocess(image)[None]))
        given = np.asarray(image) if variant.takes_pixels else variant.preprocess(image)
        error = float(np.abs(variant.probabilities(given[None]) - expected).max())
        if error > tolerance:
            raise ZooError(
                f"Probabilities of the file for a photograph of {size[0]} x {size[1]} differ from the model's by "
                f"{error:.2g}, more than {tolerance:g}: it was not kept. Please report this, with the versions of onnx "
                "and onnxruntime."
            )
