"""A head as a static web page that classifies in the visitor's browser, with onnxruntime-web."""

import base64
import hashlib
import http.client
import io
import json
import os
import shutil
import tarfile
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

from dcp_zoo.deploy.export import export
from dcp_zoo.deploy.onnx_cache import cache_folder
from dcp_zoo.deploy.onnx_classifier import OnnxClassifier
from dcp_zoo.deploy.quantize import Calibration
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import sha256_of, write_file
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.fused import FusedDCP

PAGE = Path(__file__).parent / "page"
ORT_VERSION = "1.30.0"
# as npm has it
ORT_INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
ORT_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
REGISTRY_SECONDS = 60  # without an answer


def export_web(
    model: DCP | FusedDCP,
    folder: str | Path,
    *,
    precision: str = "float16",
    calibration: Calibration | None = None,
    runtime: Path | None = None,
    title: str = "",
) -> Path:
    """Write a folder for any static web host: page, ONNX file with the preprocessing inside, and onnxruntime-web.

    Args:
        model: a fused model, or one with stored statistics; float32, on the CPU.
        folder: created; must not exist, or be empty.
        precision: of the ONNX file, as in `export`. With float16 probabilities stay within 1e-3 of Python's.
        calibration: images for int8, as in `export`.
        runtime: a folder with onnxruntime-web's files. Default: the pinned release, from a cache or npm's registry.
        title: of the page. Default: the head's model and tag.

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
            (new / "head.json").write_text(
                json.dumps(_about(file, title), ensure_ascii=False, indent=1), encoding="utf-8"
            )
            new.replace(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def check_empty(folder: Path) -> None:
    """Raise ZooError unless the folder can be created, or is empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ZooError(f"{folder} exists and is not an empty folder: remove it, or choose another --output.")


def _about(file: Path, title: str) -> dict[str, object]:
    """What the page shows of the head."""
    exported = OnnxClassifier(file)
    return {
        "name": title or exported.name,
        "classnames": exported.classnames,
        "precision": exported.info["precision"],
        "sha256": sha256_of(file),
        "dcp_zoo": version("dcp_zoo"),
    }


def copy_runtime(folder: Path, source: Path | None = None) -> None:
    """Put the files of onnxruntime-web into `folder`: from `source`, or the cache, which is filled from npm's registry
    when needed.

    Raises:
        ZooError: they are not in `source`; the registry cannot be reached, or sends something else than was pinned.
    """
    if source is None:
        source = cache_folder() / f"onnxruntime-web-{ORT_VERSION}"
        if not all((source / name).is_file() for name in ORT_FILES):
            _download_runtime(source)
    for name in ORT_FILES:
        place = next((path for path in (source / name, source / "dist" / name) if path.is_file()), None)
        if place is None:
            raise ZooError(f"{source} has no {name}: pass the folder dist of npm's package onnxruntime-web.")
        shutil.copyfile(place, folder / name)


def _download_runtime(folder: Path) -> None:
    registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")  # noqa: SIM112  npm's
    address = f"{registry}/onnxruntime-web/-/onnxruntime-web-{ORT_VERSION}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=REGISTRY_SECONDS) as response:
            archive = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ZooError(
            f"Cannot download onnxruntime-web from {address} ({error}). With a network, try again; without one, get "
            f"onnxruntime-web {ORT_VERSION} elsewhere (npm pack onnxruntime-web@{ORT_VERSION}), unpack it and pass "
            "--ort package/dist."
        ) from error
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if digest != ORT_INTEGRITY:
        raise ZooError(f"{address} is not the file that was pinned ({digest}): check the registry, or pass --ort.")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for name in ORT_FILES:
            member = tar.extractfile(f"package/dist/{name}")
            assert member is not None  # the archive is the pinned one
            write_file(folder / name, member.read(), "set DCP_ZOO_CACHE to another folder, or pass --ort")
