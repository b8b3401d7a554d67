"""A loaded head behind one interface, whatever computes: PyTorch or ONNX Runtime."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcp_zoo.deploy.onnx_classifier import OnnxClassifier, normalise, softmax
from dcp_zoo.errors import ZooError

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP

Outputs = tuple[np.ndarray, np.ndarray | None]  # probabilities (n, C); normalised image features (n, E), if kept


@dataclass(frozen=True)
class Classifier:
    """A head that is ready to classify.

    Attributes:
        architecture: name of its model.
        classnames: its classes.
        preprocessing: timm's input_size, crop_pct, mean and std.
        compute: pixels, uint8 (n, 3, H, W) -> their outputs.
    """

    architecture: str
    classnames: list[str]
    preprocessing: dict[str, Any]
    compute: Callable[[np.ndarray], Outputs]


def onnx_classifier(path: str | Path, threads: int = 0, features: bool = False) -> Classifier:
    """An exported file, run with ONNX Runtime. `features` keeps the image features.

    Raises:
        ZooError: not an exported file, or one without features.
    """
    exported = OnnxClassifier(path, threads)
    info = exported.info

    def compute(pixels: np.ndarray) -> Outputs:
        if exported.takes_pixels and not features:
            return exported.probabilities(pixels.transpose(0, 2, 3, 1)), None
        images = normalise(pixels, info["preprocessing"])
        logits, kept = exported.with_features(images) if features else (exported(images), None)
        return softmax(logits), kept

    return Classifier(info["model"], exported.classnames, info["preprocessing"], compute)


def torch_classifier(model: "DCP", features: bool = False, precision: str = "float32") -> Classifier:
    """A model on its device: in batches if its context is calibrated, otherwise each image as its own batch.

    Raises:
        ZooError: an unknown precision, or features without a calibrated context.
    """
    import torch

    from dcp_zoo.training.loop import autocast

    fused = model.fuse() if model.context == "calibrated" else None
    if features and not fused:
        raise ZooError("Only a calibrated context gives an image the same features in any batch: omit --context.")
    mean, std = (torch.tensor(model.pretrained_cfg[k], device=model.device)[:, None, None] for k in ("mean", "std"))

    @torch.inference_mode()
    def compute(pixels: np.ndarray) -> Outputs:
        images = (torch.from_numpy(pixels).to(model.device) / 255 - mean) / std
        with autocast(model.device, precision):
            if fused is None:
                logits, kept = torch.cat([model(image) for image in images.split(1)]), None
            else:
                encoded = fused.encode_image(images)
                logits, kept = fused.logits(encoded), encoded.float().cpu().numpy() if features else None
        return logits.float().softmax(-1).cpu().numpy(), kept

    return Classifier(model.architecture, model.classnames, model.pretrained_cfg, compute)
