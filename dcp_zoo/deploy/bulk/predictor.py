"""A loaded head behind one interface, whatever computes: PyTorch or ONNX Runtime."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcp_zoo.deploy.onnx_classifier import OnnxClassifier, normalise
from dcp_zoo.errors import ZooError

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP
    from dcp_zoo.model.linear_head import LinearHead

SMALLEST = np.finfo(np.float32).tiny
Computed = tuple[np.ndarray, np.ndarray | None]  # logits (n, C); normalised image features (n, E), if kept


@dataclass(frozen=True)
class Predictor:
    """A head that is ready to classify.

    Attributes:
        architecture: name of its model.
        classnames: its classes.
        preprocessing: timm's, see `crop` and `normalise` in `dcp_zoo.deploy.onnx_classifier`.
        compute: pixels, uint8 (n, 3, H, W) -> their outputs.
        threshold: an image whose in_distribution_score is below it belongs to none of the classes; None: not known.
        cannot_reject: why there is no threshold, and what to do.
    """

    architecture: str
    classnames: list[str]
    preprocessing: dict[str, Any]
    compute: Callable[[np.ndarray], Computed]
    threshold: float | None = None
    cannot_reject: str = "This head has no threshold to reject images."


def onnx_predictor(path: str | Path, threads: int = 0, features: bool = False) -> Predictor:
    """An exported file, run with ONNX Runtime. `features` keeps the image features.

    Raises:
        ZooError: not an exported file, or one without features.
    """
    exported = OnnxClassifier(path, threads)
    info = exported.info
    if features and exported.takes_pixels:
        raise ZooError(f"{path} has no image features: export it without the preprocessing inside, or omit --features.")

    def compute(pixels: np.ndarray) -> Computed:
        if exported.takes_pixels:  # and returns probabilities, whose logarithms are logits too, also for rejection
            return np.log(exported(pixels.transpose(0, 2, 3, 1)) + SMALLEST), None
        images = normalise(pixels, info["preprocessing"])
        return exported.with_features(images) if features else (exported(images), None)

    cannot_reject = (
        f"{path} has no threshold to reject images. Export a head that can reject them (dcp-zoo fit-classifier), "
        "with exactly the classes for which its threshold was fitted."
    )
    given = info["model"], exported.classnames, info["preprocessing"]
    return Predictor(*given, compute, info.get("threshold"), cannot_reject)


def torch_predictor(
    model: "DCP | LinearHead", features: bool = False, precision: str = "float32", reject: float = True
) -> Predictor:
    """A model on its device: in batches with stored statistics, otherwise each image as its own batch. `reject` is that
    of `Head.rejection_threshold`.

    Raises:
        ZooError: an unknown precision, or features without stored statistics.
    """
    import torch

    from dcp_zoo.training.device import autocast

    fused = model.fuse() if model.stats == "stored" else None
    if features and not fused:
        raise ZooError("Only stored statistics give an image the same features in any batch: omit --stats.")
    mean, std = (torch.tensor(model.pretrained_cfg[k], device=model.device)[:, None, None] for k in ("mean", "std"))

    @torch.inference_mode()
    def compute(pixels: np.ndarray) -> Computed:
        images = (torch.from_numpy(pixels).to(model.device) / 255 - mean) / std
        with autocast(model.device, precision):
            if fused is None:
                logits, kept = torch.cat([model(image) for image in images.split(1)]), None
            else:
                encoded = fused.encode_image(images)
                logits, kept = fused.logits(encoded), encoded.float().cpu().numpy() if features else None
        return logits.float().cpu().numpy(), kept

    threshold = None if model.cannot_reject else model.rejection_threshold(reject)
    given = model.architecture, model.classnames, model.pretrained_cfg
    return Predictor(*given, compute, threshold, model.cannot_reject)
