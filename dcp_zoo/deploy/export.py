"""Export a fused model to a file for other programs, and verify the file before it is kept."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from dcp_zoo.deploy.onnx_classifier import METADATA_KEY, OnnxClassifier
from dcp_zoo.deploy.quantize import Calibration
from dcp_zoo.deploy.variants import check_variant, make_variant
from dcp_zoo.errors import ZooError, check_choice, import_extra
from dcp_zoo.files import write_file
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.fused import FusedDCP
from dcp_zoo.model.linear_head import LinearHead

OLDEST_TORCH = (2, 8)  # of older ones, torch.export fixes the batch size
LOGIT_TOLERANCE = 1e-3  # in logits, which are about 10 to 40
ANY_BATCH = {"images": {0: torch.export.Dim("batch")}}
EXPORT_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}


def export(
    model: DCP | LinearHead | FusedDCP,
    path: str | Path,
    format: str = "onnx",
    *,
    preprocessing: str = "outside",
    precision: str = "float32",
    calibration: Calibration | None = None,
) -> Path:
    """Export a model with its current classes; class names and preprocessing are in the file's metadata.

    Args:
        model: a fused model, or one with stored statistics; float32, on the CPU.
        path: the file; replaced atomically.
        format: "onnx" (any batch size; its outputs are "logits" and "features", the normalised image features;
            verified with ONNX Runtime), "torch-export" (any batch size; load it with
            `torch.export.load`, the metadata is the extra file "dcp") or "safetensors" (load it with
            `dcp_zoo.model.load_fused`).
        preprocessing: of ONNX files: "outside" (images (B, 3, H, W), float32, normalised -> logits) or "inside" (pixels
            (B, H, W, 3), uint8 RGB of any size -> probabilities).
        precision: of ONNX files: "float32", "float16" (of stored weights; computed in float32) or "int8" (static
            quantisation; the metadata tell what it costs).
        calibration: images for int8; see `dcp_zoo.deploy.calibration`.

    Raises:
        ZooError: no stored statistics, a model elsewhere than on the CPU, an unknown format, missing packages, a file
            that cannot be written, or an exported file that disagrees with the model (by more than 1e-3 in a logit, or
            in the top-1 class; variants by more than 1e-3 in a probability, 5e-3 for float16) or loses too much
            accuracy (int8).
    """
    check_choice("format", format, tuple(EXPORT_SUFFIXES))
    check_variant(preprocessing, precision, format)
    check_extras(format)
    path, fused = Path(path), model if isinstance(model, FusedDCP) else model.fuse()
    if (size := fused.info["preprocessing"].get("input_size")) is None:
        raise ZooError('The input size of this model is unknown: set model.pretrained_cfg["input_size"] first.')
    if (place := fused.classifier.device.type) != "cpu":
        raise ZooError(f"The model is on {place}, and files are written on the CPU: call model.cpu() first.")
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))

    def write_and_check(temporary: str) -> None:
        read = WRITERS[format](fused, temporary, images)
        for n in (3, 1):  # a file with a fixed batch size fails here
            found, expected = read(images[:n]), fused(images[:n])
            error = (found - expected).abs().max().item()
            if error > LOGIT_TOLERANCE or not torch.equal(found.argmax(-1), expected.argmax(-1)):
                raise ZooError(
                    f"The {format} file does not match the model (logits differ by {error:.2g}) and was not kept. "
                    "Please report this, with the versions of torch and onnxruntime."
                )
        if format == "onnx":
            make_variant(temporary, preprocessing, precision, calibration)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn about their internals
        write_file(path, write_and_check, "choose another file")
    return path


def check_extras(format: str) -> None:
    """Raise ZooError if the packages for a format are not installed, or torch is too old for it."""
    if format != "safetensors" and tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise ZooError(f"Exporting {format} needs torch 2.8 or newer, not {torch.__version__}: upgrade torch.")
    for module in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        import_extra(module, "export")


Reader = Callable[[torch.Tensor], torch.Tensor]


def onnx_program(module: nn.Module, images: torch.Tensor, *outputs: str) -> Any:
    """`module.forward(images)` as an ONNX program for any batch size; `outputs` are the names of its outputs."""
    check_extras("onnx")
    return torch.onnx.export(
        module,
        (images,),
        dynamo=True,
        dynamic_shapes=ANY_BATCH,
        input_names=["images"],
        output_names=list(outputs),
        verbose=False,
    )


class LogitsAndFeatures(nn.Module):
    """images (B, 3, H, W) -> logits (B, C), normalised image features (B, E)."""

    def __init__(self, fused: FusedDCP) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.fused.encode_image(images)
        return self.fused.logits(features), features


def _write_onnx(fused: FusedDCP, path: str, images: torch.Tensor) -> Reader:
    program = onnx_program(LogitsAndFeatures(fused).eval(), images, "logits", "features")
    program.model.metadata_props[METADATA_KEY] = json.dumps(fused.info)
    program.save(path)
    read = OnnxClassifier(path)
    return lambda x: torch.from_numpy(read(np.asarray(x)))


def _write_torch_export(fused: FusedDCP, path: str, images: torch.Tensor) -> Reader:
    program = torch.export.export(fused, (images,), dynamic_shapes=ANY_BATCH)
    with open(path, "wb") as file:  # noqa: PTH123  # given a path, torch requires its own suffix
        torch.export.save(program, file, extra_files={METADATA_KEY: json.dumps(fused.info)})
    with open(path, "rb") as file:  # noqa: PTH123
        return torch.export.load(file).module()


def _write_safetensors(fused: FusedDCP, path: str, images: torch.Tensor) -> Reader:
    from dcp_zoo.model.fused import load_fused

    if fused.config["clip"] is None:
        raise ZooError("The image tower of this model cannot be rebuilt from safetensors: use onnx or torch-export.")
    state = {name: t.contiguous() for name, t in fused.state_dict().items()}
    save_file(state, path, metadata={"config": json.dumps(fused.config), METADATA_KEY: json.dumps(fused.info)})
    return load_fused(path)


WRITERS = {"onnx": _write_onnx, "torch-export": _write_torch_export, "safetensors": _write_safetensors}
