"""A head as a static web page that classifies in the visitor's browser."""

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from dcp_zoo.deploy.export import export
from dcp_zoo.deploy.onnx_classifier import OnnxClassifier
from dcp_zoo.deploy.ort_web import copy_runtime
from dcp_zoo.deploy.quantize import Calibration
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import sha256_of
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.fused import FusedDCP

PAGE = Path(__file__).parent / "page"


def export_web(
    model: DCP | FusedDCP,
    folder: str | Path,
    *,
    precision: str = "float16",
    calibration: Calibration | None = None,
    runtime: Path | None = None,
) -> Path:
    """Write a folder for any static web host: page, ONNX file with the preprocessing inside, and onnxruntime-web.

    Args:
        model: a calibrated or fused model; float32, on the CPU.
        folder: created; must not exist, or be empty.
        precision: of the ONNX file, as in `export`. With float16 probabilities stay within 1e-3 of Python's.
        calibration: images for int8, as in `export`.
        runtime: a folder with onnxruntime-web's files. Default: the pinned release, from a cache or npm's registry.

    Raises:
        ZooError: as `export`; the folder is not empty or not writable; onnxruntime-web cannot be had.
    """
    folder = Path(folder)
    check_empty(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = Path(temporary) / "page"
            shutil.copytree(PAGE, new)
            copy_runtime(new, runtime)
            file = export(
                model, new / "model.onnx", preprocessing="inside", precision=precision, calibration=calibration
            )
            (new / "head.json").write_text(json.dumps(_describe(file), ensure_ascii=False, indent=1), encoding="utf-8")
            new.replace(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def check_empty(folder: Path) -> None:
    """Raise ZooError unless the folder can be created, or is empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ZooError(f"{folder} exists and is not an empty folder: remove it, or choose another --output.")


def _describe(file: Path) -> dict[str, object]:
    info = OnnxClassifier(file).info
    return {
        "name": ".".join(filter(None, (info["model"], info["tag"]))),
        "classnames": info["classnames"],
        "precision": info["precision"],
        "sha256": sha256_of(file),
        "dcp_zoo": version("dcp_zoo"),
    }
