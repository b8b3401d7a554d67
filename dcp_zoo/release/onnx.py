"""Export a fused model for other programs; the file is verified before it is kept."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dcp_zoo.answers import log_softmax
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.fields import Values
from dcp_zoo.files import write_file
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head import Head
from dcp_zoo.pages import templates
from dcp_zoo.prediction.heads import loaded
from dcp_zoo.prediction.onnx import INPUT, METADATA_KEY, OnnxClassifier

LOGIT_TOLERANCE = 1e-3  # in logits, which are about 10 to 40


def export(model: Head | FusedHead | str, path: str | Path) -> Path:
    """Export a model with its current classes to ONNX, for any batch size: its input is "pixel_values",
    normalised images (B, 3, H, W), float32; its outputs are "logits" (B, C), "features" (B, E), the
    normalised image features, and "distance" (B,) if the model can reject. Class names and preprocessing are
    in its metadata. ZooError for no stored statistics, a model elsewhere than on the CPU, missing packages,
    a file that cannot be written, or one that disagrees with the model in ONNX Runtime (by more than 1e-3 in
    a logit, or in the top-1 class).

    Args:
        model: a fused model, or one with stored statistics; float32, on the CPU. Or the name or folder of a
            head, see `dcp_zoo.predict`.
        path: the file; replaced atomically.
    """
    check_export()
    path = Path(path)
    if isinstance(model, str):
        model = loaded(model, "cpu")
    fused = model.fuse()
    size = fused.info["preprocessing"].get("input_size")
    if size is None or fused.device.type != "cpu":
        raise ZooError(
            "Export needs a model on the CPU that knows the size of its images: call model.cpu(), or set "
            'model.pretrained_cfg = {"input_size": (3, H, W)}.'
        )
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))

    def write_and_check(temporary: str) -> None:
        write_onnx(fused, temporary, images)
        exported = OnnxClassifier(temporary)
        for n in (3, 1):  # a file with a fixed batch size fails here
            actual = exported(images[:n].numpy())
            expected = fused(images[:n]).numpy()
            check_same("logits", actual, expected, LOGIT_TOLERANCE)
            check_same("top-1 classes", actual.argmax(-1), expected.argmax(-1), 0)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn about their internals
        write_file(path, write_and_check, "choose another file")
    return path


def check_same(what: str, found: np.ndarray, expected: np.ndarray, most: float) -> None:
    """Raise ZooError if what a file and the model compute differs by more than this."""
    error = np.abs(found - expected).max()
    if error > most:
        raise ZooError(
            f"The ONNX file does not match the model ({what} differ by {error:.2g}): it is not kept. Please report "
            "this, with the versions of torch, onnx and onnxruntime."
        )


def check_export() -> None:
    """Raise ZooError if the installed packages cannot export."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(module, "export")


def onnx_program(module: nn.Module, images: torch.Tensor, *outputs: str) -> Any:
    """`module.forward(images)` as an ONNX program for any batch size; `outputs` are the names of its
    outputs."""
    before = set(os.environ)
    try:
        return torch.onnx.export(
            module,
            (images,),
            input_names=[INPUT],
            output_names=outputs,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    finally:  # torch 2.8 names a folder of its compiler there
        for name in os.environ.keys() - before:
            del os.environ[name]


class ExportedHead(nn.Module):
    """images (B, 3, H, W) -> logits (B, C), normalised image features (B, E); distances (B,) if the head
    rejects."""

    def __init__(self, fused: FusedHead) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.fused.encode_image(images)
        distance = (self.fused.distances(features),) if "threshold" in self.fused.info else ()
        return self.fused.classify(features), features, *distance


def write_onnx(fused: FusedHead, path: str, images: torch.Tensor) -> None:
    """A plain float32 file, before anything is checked."""
    distance = ["distance"] if "threshold" in fused.info else []
    program = onnx_program(ExportedHead(fused).eval(), images, "logits", "features", *distance)
    program.model.metadata_props[METADATA_KEY] = json.dumps(fused.info)
    program.save(path)


SIZES = ((640, 427), (427, 641), (300, 201), (97, 240))  # of test photographs, width and height
TOLERANCE = 1e-3  # in probabilities


def take_any_size(path: Path) -> None:
    """Put the preprocessing into an exported file, which then takes "pixel_values" (B, 3, any height, any
    width), RGB from 0 to 1, and returns "logits" (B, C) alone. ZooError for another preprocessing than a
    bicubic resize and a centre crop, and for probabilities that differ, for photographs of odd sizes; the
    file then stays as it was."""
    import onnx

    plain = OnnxClassifier(path)
    cfg = plain.preprocessing
    if (cfg["interpolation"], cfg["crop_mode"]) != ("bicubic", "center"):
        raise ZooError(
            "Only a bicubic resize and a centre crop can be part of the file, which this head does not have: export "
            "it to a file for programs that resize, as --format onnx does."
        )

    def write_and_check(temporary: str) -> None:
        onnx.save(with_preprocessing(onnx.load(path), cfg), temporary)
        check_any_size(temporary, plain)

    write_file(path, write_and_check)


def with_preprocessing(head: Any, cfg: Values) -> Any:
    """An exported model behind the graph of its preprocessing, with its logits alone."""
    from onnx import compose, parser

    (opset,) = (entry.version for entry in head.opset_import if entry.domain == "")
    graph = parser.parse_model(preprocessing_graph(cfg, head.ir_version, opset))
    compose.add_prefix(head, "head/", rename_outputs=False, inplace=True)  # no name is in both
    both = compose.merge_models(graph, head, [("images", f"head/{INPUT}")])
    del both.graph.output[1:]
    del both.metadata_props[:]
    return both


def check_any_size(path: str, plain: OnnxClassifier) -> None:
    """Raise ZooError unless a file gives photographs the probabilities that another gives them, resized."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for photograph, size in zip(sample_images(), SIZES, strict=False):
        image = load_image(photograph).resize(size, Image.Resampling.BICUBIC)
        rgb = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
        (logits,) = session.run(["logits"], {INPUT: rgb})
        expected = plain(plain.preprocess(image)[None])
        check_same("probabilities", np.exp(log_softmax(logits)), np.exp(log_softmax(expected)), TOLERANCE)


def preprocessing_graph(cfg: Values, ir: int, opset: int) -> str:
    """The graph of the preprocessing in ONNX's text format, of these versions."""
    return templates(__package__).get_template("preprocessing.onnx.jinja").render(cfg=cfg, ir=ir, opset=opset)
