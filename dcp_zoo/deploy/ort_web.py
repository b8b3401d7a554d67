"""The two files of onnxruntime-web that an exported web page needs, from npm's registry, a cache or a folder."""

import base64
import hashlib
import http.client
import io
import os
import shutil
import tarfile
import urllib.request
from functools import partial
from pathlib import Path

from dcp_zoo.deploy.onnx_cache import cache_folder
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import write_atomically

VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # npm's
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
SECONDS = 60  # without an answer from the registry


def copy_runtime(folder: Path, source: Path | None = None) -> None:
    """Put the files into `folder`: from `source`, or the cache, which is filled from npm's registry when needed.

    Raises:
        ZooError: they are not in `source`; the registry cannot be reached, or sends something else than was pinned.
    """
    if source is None:
        source = cache_folder() / f"onnxruntime-web-{VERSION}"
        if not all((source / name).is_file() for name in FILES):
            _download(source)
    for name in FILES:
        place = next((path for path in (source / name, source / "dist" / name) if path.is_file()), None)
        if place is None:
            raise ZooError(f"{source} has no {name}: pass the folder dist of npm's package onnxruntime-web.")
        shutil.copyfile(place, folder / name)


def _download(folder: Path) -> None:
    registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")  # noqa: SIM112  npm's
    address = f"{registry}/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as response:
            archive = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ZooError(
            f"Cannot download onnxruntime-web from {address} ({error}). With a network, try again; without one, get "
            f"onnxruntime-web {VERSION} elsewhere (npm pack onnxruntime-web@{VERSION}), unpack it and pass --ort "
            "package/dist."
        ) from error
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if digest != INTEGRITY:
        raise ZooError(f"{address} is not the file that was pinned ({digest}): check the registry, or pass --ort.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for name in FILES:
                member = tar.extractfile(f"package/dist/{name}")
                assert member is not None  # the archive is the pinned one
                write_atomically(folder / name, partial(_save, content=member.read()))
    except OSError as error:
        raise cannot_write(folder, error, "set DCP_ZOO_CACHE to another folder, or pass --ort") from error


def _save(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
