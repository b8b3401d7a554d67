"""Heads as ONNX files in the user's cache: exported on first use, later read without torch."""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from dcp_zoo._version import __version__
from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.errors import import_extra
from dcp_zoo.files import LOCK, cache_folder, check_writable, locked, sha256_of
from dcp_zoo.heads.config import read_config
from dcp_zoo.zoo.resolve import head_folder, head_sha256

FOLDER = f"onnx-{__version__}"  # in the user's cache
WAIT = 300  # seconds, for another process that exports the same


def onnx_file(name: str, classnames: Sequence[str] | None = None, log: Callable[[str], object] = print) -> Path:
    """The ONNX file of a head, see `head_folder`, or of its model with other classes, in the cache; exported if it is
    not there, which `log` is told. ZooError as of `export`, for an unknown head, or a cache that is not writable."""
    import_extra("onnxruntime", "export")
    folder = head_folder(name)
    hashes = [head_sha256(folder)]
    if read_config(folder)["dcp"]["clip"] == "bundled":
        hashes.append(sha256_of(MINI_WEIGHTS))
    depends_on = json.dumps([*hashes, list(classnames or [])])
    path = cache_folder(FOLDER) / f"{folder.name}-{sha256(depends_on.encode()).hexdigest()[:16]}.onnx"
    if not path.exists():
        check_writable(path.parent, "set DCP_ZOO_CACHE to another folder, or pass an exported file with --head")
        from dcp_zoo.onnx.export import check_export, export
        from dcp_zoo.zoo.factory import create_model

        check_export()
        with locked(path.with_name(f".{path.name}{LOCK}"), WAIT):  # of another process that exports it
            if not path.exists():
                log(f"Exporting {name} to ONNX, once, which takes up to a minute: {path}")
                export(create_model(name, True, classnames=classnames).eval(), path)
    return path
