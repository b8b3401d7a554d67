"""The HTTP server of one head, `app`. Here, without its packages: where it listens, whom it answers, and
what a request may hold."""

import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from dcp_zoo.errors import ZooError, as_zoo_error


class Limits(NamedTuple):
    """What one request may hold."""

    max_bytes: float = 20e6
    max_pixels: int = 50_000_000  # per image
    max_images: int = 16
    timeout: float = 30  # seconds for a request to arrive; also the grace period at shutdown


DEFAULT_LIMITS = Limits()
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
ALL_INTERFACES = ("0.0.0.0", "::", "")


def allowed_hosts(host: str, names: Sequence[str] = ()) -> list[str]:
    """The names by which clients may call a server on `host`, so that no web page reaches its visitor's."""
    for name in names:
        if not re.fullmatch(r"(\*\.)?[\w.-]+|\[?[\da-fA-F:.]+\]?|\*", name):
            raise ZooError(f"--allow-hosts takes names without scheme and port, such as example.org, not {name}.")
    own = [] if host in ALL_INTERFACES else [host, f"[{host}]"]
    return [*LOCAL_HOSTS, *own, *names]


def server(app: Callable[..., Awaitable[None]], shutdown_seconds: float) -> Any:
    """A uvicorn.Server that on shutdown gives requests in progress so many seconds to finish."""
    import uvicorn

    config = uvicorn.Config(app, ws="none", log_level="warning", timeout_graceful_shutdown=round(shutdown_seconds))
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 picks a free one. ZooError if the port is taken."""
    with as_zoo_error(f"Cannot listen on {host}, port {port} ({{}}): pass other --host or --port.", OSError):
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
