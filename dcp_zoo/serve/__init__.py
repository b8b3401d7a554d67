"""The HTTP server of one head. Here: where it listens, whom it answers, and what a request may hold; this needs none of
the packages of the server, which is in `app`."""

import json
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dcp_zoo._version import __version__
from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra
from dcp_zoo.fields import Checked, count, option
from dcp_zoo.files import LOCK, cache_folder, check_writable, locked, sha256_of
from dcp_zoo.heads.config import read_config
from dcp_zoo.zoo.resolve import head_folder, head_sha256


@dataclass(frozen=True)
class Limits(Checked):
    """What one request may hold; ZooError for a limit that lets nothing through."""

    max_mb: float = option(20, "Size of one request, in megabytes, at most.", min=0.001)
    max_pixels: int = count(50_000_000, "Pixels per image, at most.")
    max_images: int = count(16, "Images per request, at most.")
    timeout: float = option(30, "Seconds for a request to arrive; also the grace period at shutdown.", min=0.001)

    @property
    def max_bytes(self) -> int:
        return round(1e6 * self.max_mb)


DEFAULT_LIMITS = Limits()
FOLDER = f"onnx-{__version__}"  # in the user's cache, of exported heads
WAIT = 300  # seconds, for another process that exports the same
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
ALL_INTERFACES = ("0.0.0.0", "::", "")


def allowed_hosts(host: str, names: Sequence[str] = ()) -> list[str]:
    """The names by which clients may call a server on `host`, so that no web page reaches its visitor's."""
    for name in names:
        if not re.fullmatch(r"(\*\.)?[\w.-]+|\[?[\da-fA-F:.]+\]?|\*", name):
            raise ZooError(f"--allow-hosts takes names without scheme and port, such as example.org, not {name}.")
    return [*LOCAL_HOSTS, *([] if host in ALL_INTERFACES else [host, f"[{host}]"]), *names]


def server(app: Callable[..., Awaitable[None]], shutdown_seconds: float) -> Any:
    """A uvicorn.Server that, when it is stopped, first answers the requests in progress, for so many seconds."""
    import uvicorn

    stop = round(shutdown_seconds)
    return uvicorn.Server(uvicorn.Config(app, ws="none", log_level="warning", timeout_graceful_shutdown=stop))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 picks a free one. ZooError if the port is taken."""
    with as_zoo_error(f"Cannot listen on {host}, port {port} ({{}}): pass other --host or --port.", OSError):
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


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
