"""Classify with an exported ONNX file: ONNX Runtime, PIL and NumPy, no torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.answers import Outputs, Thresholds
from dcp_zoo.data.images import ImageLike, normalise
from dcp_zoo.errors import ZooError, as_zoo_error, check_choice, import_extra, warn
from dcp_zoo.features.photos import pixels_of
from dcp_zoo.prediction import Backend

INPUT = "pixel_values"  # of normalised images, as other programs call it
CUDA = "CUDAExecutionProvider"
NO_CUDA = "ONNX Runtime computes on the CPU, not on {}: install onnxruntime-gpu in its place, and check the driver."
METADATA_KEY = "dcp"  # of the JSON in an exported file: class names, preprocessing, origin


def providers(device: str) -> list[Any]:
    """ONNX Runtime's providers for "auto", "cpu" or "cuda"; the CPU, with a warning, without one for a
    GPU."""
    kind, _, number = device.partition(":")
    check_choice("device", kind, ("auto", "cpu", "cuda"))
    cpu: list[Any] = ["CPUExecutionProvider"]
    if kind != "cpu" and CUDA in import_extra("onnxruntime", "export").get_available_providers():
        return [(CUDA, {"device_id": number or "0"}), *cpu]
    if kind == "cuda":
        warn(NO_CUDA.format(device))
    return cpu


class OnnxClassifier(Backend):
    """An exported model. ZooError for a file that is missing, or no export of this package, or that
    cannot reject where that is asked for.

    Args:
        path: a file written by `dcp-zoo export --format onnx`.
        threads, device: how many, 0 for ONNX Runtime's choice; and where, see `providers`.
        reject: whether images of none of the classes are rejected; None: if the file has a threshold.
        features: whether outputs keep the image features.

    Attributes:
        info: class names, preprocessing, origin, and what the head promises, from the file's metadata.
        name: MODEL, or MODEL.TAG, of the head.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int = 0,
        device: str = "cpu",
        *,
        reject: bool | None = None,
        features: bool = False,
    ) -> None:
        runtime = import_extra("onnxruntime", "export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the cores to others
        chosen = providers(device)
        # ONNX Runtime has a separate exception for every kind of bad file
        with as_zoo_error(f"{path} is not an exported model ({{}}): create one with dcp-zoo export.", Exception):
            self.session = runtime.InferenceSession(str(path), options, providers=chosen)
            self.info = info = json.loads(self.session.get_modelmeta().custom_metadata_map[METADATA_KEY])
            self.architecture = info["model"]
            self.classnames = info["classnames"]
            self.preprocessing = info["preprocessing"]
            threshold = info.get("threshold")
            self.promises = info.get("promises", {})
            self.thresholds = Thresholds(None if reject is False else threshold, threshold if self.promises else None)
            self.name = ".".join(filter(None, (info["model"], info["tag"])))
        if len(chosen) > 1 and CUDA not in self.session.get_providers():  # it is installed, and cannot start
            warn(NO_CUDA.format(device))
        outputs = [output.name for output in self.session.get_outputs()]
        self._returned = outputs if features else [name for name in outputs if name != "features"]
        if reject and threshold is None:
            advice = "Export a head that can (dcp-zoo train), with exactly the classes for which it was fitted."
            raise ZooError(f"{path} has no threshold to reject images. {advice}")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """A batch of what `preprocess` returns -> logits (B, C)."""
        return self.session.run(["logits"], {INPUT: images})[0]

    def preprocess(self, image: ImageLike) -> np.ndarray:
        """An image -> (3, H, W), as `create_transform` returns it."""
        return normalise(pixels_of(image, self.preprocessing), self.preprocessing)

    def compute(self, pixels: np.ndarray) -> Outputs:
        """Pixels, uint8 (n, 3, H, W) -> the outputs of n images."""
        arrays = self.session.run(self._returned, {INPUT: normalise(pixels, self.preprocessing)})
        results = dict(zip(self._returned, arrays, strict=True))
        return self.thresholds.outputs(results["logits"], results.get("distance"), results.get("features"))
