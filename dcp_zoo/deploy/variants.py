"""Variants of an exported ONNX file: lower precision, preprocessing and softmax inside; each is verified against the
plain file."""

import json
from typing import Any

import numpy as np
from PIL import Image

from dcp_zoo.data import load_image
from dcp_zoo.data.samples import sample_images
from dcp_zoo.deploy.onnx_classifier import METADATA_KEY, OnnxClassifier, softmax
from dcp_zoo.deploy.quantize import Calibration, quantize
from dcp_zoo.errors import ZooError, check_choice

WHERE_PREPROCESSED = ("outside", "inside")
SIZES = ((640, 427), (427, 641), (300, 201), (97, 240))  # of test photographs, width and height
TOLERANCES = {"float32": 1e-3, "float16": 5e-3, "int8": 0.05}  # in probabilities; of int8, for its preprocessing alone
SMALL = 1024  # weights with at most this many numbers stay in float32

# PIL's resize, up to 1 of 255 grey levels in a few of 10,000 values: the short side, then the centre.
PREPROCESSING_GRAPH = """
<ir_version: {ir}, opset_import: ["": {opset}]>
preprocessing (uint8[batch, height, width, 3] pixels) => (float[batch, 3, {rows}, {columns}] images)
<int64[1] short_side = {{{short_side}}}, int64[2] crop = {{{rows}, {columns}}}, int64[2] sides = {{1, 2}},
 float two = {{2.0}}, float[3] scale = {{{scale}}}, float[3] offset = {{{offset}}}>
{{
    size = Shape <start = 1, end = 3> (pixels)
    shorter = ReduceMin <keepdims = 1> (size)
    scaled = Mul (size, short_side)
    resized_size = Div (scaled, shorter)
    resized = Resize <mode = "cubic", antialias = 1, cubic_coeff_a = -0.5, exclude_outside = 1, axes = [1, 2]>
        (pixels, , , resized_size)
    margin = Sub (resized_size, crop)
    margin_float = Cast <to = 1> (margin)
    half = Div (margin_float, two)
    rounded = Round (half)
    start = Cast <to = 7> (rounded)
    end = Add (start, crop)
    cropped = Slice (resized, start, end, sides)
    levels = Cast <to = 1> (cropped)
    scaled_levels = Mul (levels, scale)
    normalised = Add (scaled_levels, offset)
    images = Transpose <perm = [0, 3, 1, 2]> (normalised)
}}
"""


def check_variant(preprocessing: str, precision: str, format: str) -> None:
    """Raise ZooError for an unknown variant, or a format that has none."""
    check_choice("preprocessing", preprocessing, WHERE_PREPROCESSED)
    check_choice("precision", precision, tuple(TOLERANCES))
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
            raise ZooError("int8 needs images: pass calibration=dcp_zoo.deploy.calibration(model, split).")
        info["quantization"] = quantize(path, data)  # this compares top-1
        plain = OnnxClassifier(path)
    model = onnx.load(path)
    if precision == "float16":
        model = with_float16_weights(model)
    if preprocessing == "inside":
        model = with_preprocessing(model, info["preprocessing"])
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(info)})
    onnx.save(model, path)
    _compare_probabilities(OnnxClassifier(path), plain, TOLERANCES[precision])


def _compare_probabilities(variant: OnnxClassifier, plain: OnnxClassifier, tolerance: float) -> None:
    photographs = [load_image(path) for path in sample_images()]
    for photograph, size in zip(photographs, SIZES, strict=False):
        image = photograph.resize(size, Image.Resampling.BICUBIC)
        expected = softmax(plain(plain.preprocess(image)[None]))
        given = np.asarray(image) if variant.takes_pixels else variant.preprocess(image)
        error = float(np.abs(variant.probabilities(given[None]) - expected).max())
        if error > tolerance:
            raise ZooError(
                f"Probabilities of the file for a photograph of {size[0]} x {size[1]} differ from the model's by "
                f"{error:.2g}, more than {tolerance:g}: it was not kept. Please report this, with the versions of onnx "
                "and onnxruntime."
            )


def with_preprocessing(model: Any, cfg: dict[str, Any]) -> Any:
    """images -> logits becomes pixels (B, H, W, 3), uint8 RGB of any size -> probabilities (B, C).

    Args:
        model: an `onnx.ModelProto` with the input `images` and the output `logits`.
        cfg: the preprocessing, as in an exported file's metadata.

    Raises:
        ZooError: preprocessing other than a bicubic resize and a centre crop.
    """
    import onnx

    if cfg.get("interpolation", "bicubic") != "bicubic" or cfg.get("crop_mode", "center") != "center":
        raise ZooError(
            f"Only a bicubic resize and a centre crop can be part of the file, not {cfg['interpolation']} and "
            f"{cfg['crop_mode']}: export with the preprocessing outside."
        )
    ir, opset = model.ir_version, next(entry.version for entry in model.opset_import if entry.domain == "")
    before = onnx.parser.parse_model(preprocessing_graph(cfg, ir, opset))
    before = onnx.compose.add_prefix(before, "preprocessing/", rename_inputs=False, rename_outputs=False)
    model = onnx.compose.merge_models(before, model, [("images", "images")])
    probabilities = next(output for output in model.graph.output if output.name == "logits")
    probabilities.name = "probabilities"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1))
    del model.graph.output[:]
    model.graph.output.append(probabilities)
    return model


def preprocessing_graph(cfg: dict[str, Any], ir: int, opset: int) -> str:
    """The preprocessing as text of an ONNX model."""
    _, rows, columns = cfg["input_size"]
    scale = ", ".join(f"{1 / (255 * std):.9e}" for std in cfg["std"])
    offset = ", ".join(f"{-mean / std:.9e}" for mean, std in zip(cfg["mean"], cfg["std"], strict=True))
    crop = {"rows": rows, "columns": columns, "short_side": int(rows / cfg["crop_pct"])}
    return PREPROCESSING_GRAPH.format(ir=ir, opset=opset, **crop, scale=scale, offset=offset)


def with_float16_weights(model: Any) -> Any:
    """Store weights in float16 and cast them when the file is loaded: half the size, float32 arithmetic."""
    import onnx

    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) <= SMALL:
            continue
        name, half = weight.name, onnx.numpy_helper.to_array(weight).astype(np.float16)
        weight.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}/float16"))
        casts.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
