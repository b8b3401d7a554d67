"""Changes to an exported ONNX graph: preprocessing and softmax inside it, weights stored in float16."""

from typing import Any

from dcp_zoo.errors import ZooError

SMALL = 1024  # weights with at most this many numbers stay in float32

# PIL's resize, up to 1 of 255 grey levels in a few of 10,000 values: the short side, then the centre.
PREPROCESSING = """
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
SOFTMAX = """
<ir_version: {ir}, opset_import: ["": {opset}]>
softmax (float[batch, classes] scores) => (float[batch, {classes}] probabilities)
{{
    probabilities = Softmax <axis = -1> (scores)
}}
"""


def with_preprocessing(model: Any, preprocessing: dict[str, Any]) -> Any:
    """images -> logits becomes pixels (B, H, W, 3), uint8 RGB of any size -> probabilities (B, C).

    Args:
        model: an `onnx.ModelProto` with the input `images` and the output `logits`.
        preprocessing: as in an exported file's metadata.

    Raises:
        ZooError: preprocessing other than a bicubic resize and a centre crop.
    """
    import onnx

    cfg = preprocessing
    if cfg.get("interpolation", "bicubic") != "bicubic" or cfg.get("crop_mode", "center") != "center":
        raise ZooError(
            f"Only a bicubic resize and a centre crop can be part of the file, not {cfg['interpolation']} and "
            f"{cfg['crop_mode']}: export with the preprocessing outside."
        )
    logits = next(output for output in model.graph.output if output.name == "logits")
    versions = {
        "ir": model.ir_version,
        "opset": next(entry.version for entry in model.opset_import if entry.domain == ""),
    }
    before = onnx.parser.parse_model(PREPROCESSING.format(**versions, **preprocessing_numbers(cfg)))
    after = onnx.parser.parse_model(SOFTMAX.format(**versions, classes=logits.type.tensor_type.shape.dim[1].dim_value))
    before = onnx.compose.add_prefix(before, "preprocessing/", rename_inputs=False, rename_outputs=False)
    model = onnx.compose.merge_models(before, model, [("images", "images")])
    return onnx.compose.merge_models(model, after, [("logits", "scores")], outputs=["probabilities"])


def preprocessing_numbers(cfg: dict[str, Any]) -> dict[str, Any]:
    """The numbers in `PREPROCESSING`."""
    _, rows, columns = cfg["input_size"]
    return {
        "rows": rows,
        "columns": columns,
        "short_side": int(rows / cfg["crop_pct"]),
        "scale": ", ".join(f"{1 / (255 * std):.9e}" for std in cfg["std"]),
        "offset": ", ".join(f"{-mean / std:.9e}" for mean, std in zip(cfg["mean"], cfg["std"], strict=True)),
    }


def with_float16_weights(model: Any) -> Any:
    """Store weights in float16 and cast them when the file is loaded: half the size, float32 arithmetic."""
    import numpy as np
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
