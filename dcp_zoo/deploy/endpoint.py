"""Where a server listens, and what it accepts; needs none of the server's packages."""

import socket
from dataclasses import dataclass

from dcp_zoo.errors import ZooError


@dataclass(frozen=True)
class Limits:
    """Of one request, and of all that wait."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_images: int = 16
    max_waiting: int = 256
    max_batch: int = 16
    seconds: float = 30  # to receive a request; to finish those in progress when the server stops


DEFAULT_LIMITS = Limits()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 picks a free one. ZooError if the port is taken."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ZooError(f"Cannot listen on {host}, port {port} ({error}): pass other --host or --port.") from error
