"""The HTTP server of one head. Here: where it listens, whom it answers, and what a request may hold; this needs none of
the packages of the server, which is in `app`."""

import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.fields import Checked, count, option


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
