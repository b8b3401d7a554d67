"""A head as a static web page that classifies in the visitor's browser, with onnxruntime-web."""

import base64
import hashlib
import http.client
import io
import json
import os
import shutil
import tarfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

from dcp_zoo.answers import DISTANCE_WEIGHT
from dcp_zoo.deploy.export import export
from dcp_zoo.deploy.onnx_classifier import OnnxClassifier
from dcp_zoo.errors import ZooError, as_zoo_error, writing_to
from dcp_zoo.files import cache_folder, cache_root, check_empty, printable, sha256_of, unfinished, write_file
from dcp_zoo.model.fused import FusedHead
from dcp_zoo.model.head import Head

PAGE = Path(__file__).parent / "page"
ORT_VERSION = "1.30.0"
RUNTIME_FOLDER = f"onnxruntime-web-{ORT_VERSION}"  # in the user's cache
# as npm has it
ORT_INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
ORT_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
REGISTRY_SECONDS = 60  # without an answer


def export_web(
    model: Head | FusedHead,
    folder: str | Path,
    *,
    precision: str = "float16",
    title: str = "",
) -> Path:
    """Write a folder for any static web host: page, ONNX file with the preprocessing inside, and onnxruntime-web.
    ZooError as of `export`, and for a folder that is not empty or not writable, or where onnxruntime-web cannot be had.

    Args:
        model, precision: as in `export`. With float16 probabilities stay within 1e-3 of Python's, but
            for images with transparent parts, which browsers make black.
        folder: created; must not exist, or be empty.
        title: of the page. Default: the head's model and tag.
    """
    folder = Path(folder)
    check_empty(folder)
    with writing_to(folder), unfinished(folder) as new:
        shutil.copytree(PAGE, new, dirs_exist_ok=True)
        for source in runtime_files():
            shutil.copyfile(source, new / source.name)
        file = export(model, new / "model.onnx", preprocessing="inside", precision=precision)
        exported = OnnxClassifier(file)
        about = {
            "name": title or exported.name,
            "classnames": list(map(printable, exported.classnames)),
            "precision": exported.info["precision"],
            "sha256": sha256_of(file),
            "dcp_zoo": version("dcp_zoo"),
        }
        if exported.rejects:
            about |= {"threshold": exported.info["threshold"], "distance_weight": DISTANCE_WEIGHT}
        (new / "head.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
        new.replace(folder)
    return folder


def runtime_files() -> list[Path]:
    """The files of onnxruntime-web: in the cache, or else from npm's registry."""
    folder = cache_root() / RUNTIME_FOLDER
    files = [folder / name for name in ORT_FILES]
    if all(file.is_file() for file in files):
        return files
    registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")  # noqa: SIM112  npm's
    address = f"{registry}/onnxruntime-web/-/onnxruntime-web-{ORT_VERSION}.tgz"
    by_hand = f"unpack it and copy {' and '.join(ORT_FILES)} from package/dist to {folder}"
    failed = f"Cannot download {address} ({{}}). Without a network, get it elsewhere, {by_hand}."
    with (
        as_zoo_error(failed, OSError, http.client.HTTPException),
        urllib.request.urlopen(address, timeout=REGISTRY_SECONDS) as response,
    ):
        archive = response.read()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if digest != ORT_INTEGRITY:
        raise ZooError(f"{address} is not the file that was pinned ({digest}): check the registry.")
    cache_folder(RUNTIME_FOLDER)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for file in files:
            member = tar.extractfile(f"package/dist/{file.name}")
            assert member is not None  # the archive is the pinned one
            write_file(file, member.read(), "set DCP_ZOO_CACHE to another folder")
    return files
