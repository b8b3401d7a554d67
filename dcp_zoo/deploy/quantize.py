"""Static int8 quantisation of an exported ONNX file, calibrated on training images and checked on labelled ones."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcp_zoo.data import Split
from dcp_zoo.data.dataset import ImageDataset
from dcp_zoo.data.splits import Item, few_shot
from dcp_zoo.deploy.onnx_classifier import INPUT, OnnxClassifier
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.model.head import Head

MAX_DROP = 1.0  # percentage points of top-1
CALIBRATING, CHECKING = 128, 1000  # at most so many images for either
RUN_IMAGES = 8  # at once
FIRST = 12  # convolutions that stay float32: few weights, and rounding errors there spread through the whole network


@dataclass(frozen=True)
class Calibration:
    """Images for int8, as the model takes them."""

    images: np.ndarray  # (n, 3, H, W), to find value ranges
    checked: np.ndarray  # (m, 3, H, W), to compare top-1 before and after
    labels: np.ndarray  # (m,), of these
    part: str  # which images those are
    max_drop: float = MAX_DROP


def calibration(model: Head, split: Split, max_drop: float = MAX_DROP) -> Calibration:
    """Images for int8: the head's training images and, for the check, validation or test images if there are any.
    ZooError for images of other classes than the head's."""
    from dcp_zoo.zoo.factory import create_transform

    if split.classnames != model.classnames:
        raise ZooError("int8 needs images of the head's own classes, in its order: pass such a split.")
    info, transform = model.info, create_transform(model)
    if info.get("shots"):
        split = few_shot(split, info["shots"], info.get("seed", 1))

    def load(items: Sequence[Item], most: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = items[:: -(-len(items) // most)]
        pairs = ImageDataset(chosen, transform, cache_bytes=0).__getitems__(range(len(chosen)))
        return np.stack([image.numpy() for image, _ in pairs]), np.array([label for _, label in pairs])

    parts = {"validation": split.val, "test": split.test, "training": split.train}
    part = next(name for name, items in parts.items() if items)
    images, _ = load(split.train, CALIBRATING)
    checked, labels = load(parts[part], CHECKING)
    return Calibration(images, checked, labels, part, max_drop)


def quantize(path: str, data: Calibration) -> Values:
    """Replace a float32 file by an int8 one: weights per channel, activations by their range on `data.images`; what
    that costs. ZooError if top-1 falls by more than `data.max_drop`."""
    before = OnnxClassifier(path)
    _quantize_file(path, data.images)
    after = OnnxClassifier(path)
    answers = [np.concatenate([model(x).argmax(1) for x in _in_runs(data.checked)]) for model in (before, after)]
    top1 = [100 * float((answer == data.labels).mean()) for answer in answers]
    if top1[0] - top1[1] > data.max_drop:
        images = f"on {len(data.labels)} {data.part} images, by more than {data.max_drop:g}: nothing was written"
        advice = 'Export with precision="float16", or allow more: calibration(..., max_drop=5).'
        raise ZooError(f"int8 lowers top-1 from {top1[0]:.1f} to {top1[1]:.1f} % {images}. {advice}")
    return {
        "top1_float32": round(top1[0], 2),
        "top1_int8": round(top1[1], 2),
        "same_answer": round(100 * float((answers[0] == answers[1]).mean()), 2),
        "images": len(data.labels),
        "part": data.part,
    }


def _quantize_file(path: str, images: np.ndarray) -> None:
    """The first convolutions, products of two activations, the classifier and the distance stay float32."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        batches = iter(_in_runs(images))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))  # advice to pre-process the file, which is done
    try:
        with tempfile.TemporaryDirectory() as folder:
            optimised = str(Path(folder) / "optimised.onnx")
            quant_pre_process(path, optimised, skip_symbolic_shape=True)
            graph = onnx.load(optimised).graph
            weights = {weight.name for weight in graph.initializer}
            convolutions = [node.name for node in graph.node if node.op_type == "Conv"]
            products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
            attention = [node.name for node in products if node.input[1] not in weights]
            last = 3 if len(graph.output) > 2 else 1  # those of the distance are exact, too
            quantize_static(
                optimised,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                nodes_to_exclude=[*convolutions[:FIRST], *attention, *(node.name for node in products[-last:])],
            )
    finally:
        logging.disable(disabled)


def _in_runs(images: np.ndarray) -> list[np.ndarray]:
    return [images[i : i + RUN_IMAGES] for i in range(0, len(images), RUN_IMAGES)]
