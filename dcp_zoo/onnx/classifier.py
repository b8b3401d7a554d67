"""Classify with an exported ONNX file: ONNX Runtime, PIL and NumPy, no torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcp_zoo.answers import Answering, Outputs, log_softmax
from dcp_zoo.data.images import crop, normalise
from dcp_zoo.errors import ZooError, as_zoo_error, check_choice, import_extra, warn
from dcp_zoo.fields import Values
from dcp_zoo.prediction.predictor import Predictor

SMALLEST = np.finfo(np.float32).tiny
INPUT = "pixel_values"  # of normalised images, as other programs call it
CUDA = "CUDAExecutionProvider"
NO_CUDA = "ONNX Runtime computes on the CPU, not on {}: install onnxruntime-gpu in its place, and check the driver."
METADATA_KEY = "dcp"  # of the JSON in an exported file: class names, preprocessing, origin


def providers(device: str) -> list[Any]:
    """ONNX Runtime's providers for "auto", "cpu" or "cuda"; the CPU, with a warning, where there is none for a GPU."""
    kind, _, number = device.partition(":")
    check_choice("device", kind, ("auto", "cpu", "cuda"))
    cpu: list[Any] = ["CPUExecutionProvider"]
    if kind != "cpu" and CUDA in import_extra("onnxruntime", "export").get_available_providers():
        return [(CUDA, {"device_id": number or "0"}), *cpu]
    if kind == "cuda":
        warn(NO_CUDA.format(device))
    return cpu


class OnnxClassifier:
    """An exported model. ZooError for a file that is missing, or no export of this package.

    Args:
        path: a file written by `dcp-zoo export --format onnx`.
        threads, device: how many, 0 for ONNX Runtime's choice; and where, see `providers`.

    Attributes:
        info: class names, preprocessing and origin, from the file's metadata.
        name: MODEL, or MODEL.TAG, of the head.
        takes_pixels: whether the preprocessing is inside the file, which then takes `pixels` (B, H, W, 3), uint8 RGB
            of any size, and returns probabilities.
    """

    def __init__(self, path: str | Path, threads: int = 0, device: str = "cpu") -> None:
        runtime = import_extra("onnxruntime", "export")
        if not Path(path).is_file():
            raise ZooError(f"There is no file {path}: create one with dcp-zoo export.")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the cores to others
        self.path, chosen = path, providers(device)
        # ONNX Runtime has a separate exception for every kind of bad file
        with as_zoo_error(f"{path} is not an exported model ({{}}): create one with dcp-zoo export.", Exception):
            self.session = runtime.InferenceSession(str(path), options, providers=chosen)
            self.info = json.loads(self.session.get_modelmeta().custom_metadata_map[METADATA_KEY])
            self.classnames: list[str] = self.info["classnames"]
            self.name = ".".join(filter(None, (self.info["model"], self.info["tag"])))
        if len(chosen) > 1 and CUDA not in self.session.get_providers():  # it is installed, and cannot start
            warn(NO_CUDA.format(device))
        self.rejects = "threshold" in self.info
        taken = self.session.get_inputs()[0].name
        self.takes_pixels = taken == "pixels"
        self._names = taken, "probabilities" if self.takes_pixels else "logits"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """A batch of what `preprocess` returns -> logits (B, C), or probabilities if the file `takes_pixels`."""
        taken, returned = self._names
        return self.session.run([returned], {taken: images})[0]

    def outputs(self, images: np.ndarray, *others: str) -> list[Any]:
        """A batch of what `preprocess` returns -> logits (B, C), of a file that `takes_pixels` logarithms of
        probabilities; the distances (B,) of `Answering`, or None; and `others`, such as "features" (B, E)."""
        taken, returned = self._names
        distance = ["distance"] if self.rejects else []
        found = self.session.run([returned, *distance, *others], {taken: images})
        if self.takes_pixels:
            found[0] = np.log(found[0] + SMALLEST)
        return found if self.rejects else [found[0], None, *found[1:]]

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """A batch of what `preprocess` returns -> probabilities (B, C)."""
        return np.exp(log_softmax(self.outputs(images)[0]))

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """An RGB image -> (3, H, W), as `create_transform` returns it; if the file `takes_pixels`, (H, W, 3)."""
        cfg = self.info["preprocessing"]
        pixels = crop(image, cfg)
        return pixels.transpose(1, 2, 0) if self.takes_pixels else normalise(pixels, cfg)

    def classify(self, image: Image.Image, top_k: int = 5) -> list[Values]:
        """The `top_k` classes of one image with their probabilities, best first."""
        return Answering(top_k)(self.outputs(self.preprocess(image)[None])[0], self.classnames)[0]["predictions"]


def onnx_predictor(path: str | Path, threads: int = 0, features: bool = False, device: str = "cpu") -> Predictor:
    """An exported file, run with ONNX Runtime; ZooError if it is none, or has no `features` and these are wanted."""
    exported = OnnxClassifier(path, threads, device)
    info = exported.info
    if features and exported.takes_pixels:
        raise ZooError(
            f"{path} has no image features: export it with the preprocessing outside, or omit --features, --together."
        )

    def compute(pixels: np.ndarray) -> Outputs:
        if exported.takes_pixels:
            return Outputs(*exported.outputs(pixels.transpose(0, 2, 3, 1)))
        images = normalise(pixels, info["preprocessing"])
        return Outputs(*exported.outputs(images, *(["features"] if features else [])))

    advice = "Export a head that can (dcp-zoo train), with exactly the classes for which it was fitted."
    cannot_reject = f"{path} has no threshold to reject images. {advice}"
    given = info["model"], exported.classnames, info["preprocessing"]
    return Predictor(*given, compute, threshold=info.get("threshold"), cannot_reject=cannot_reject)
