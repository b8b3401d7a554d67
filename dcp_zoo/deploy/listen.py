"""The socket of a server."""

import socket

from dcp_zoo.errors import ZooError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 picks a free one. ZooError if the port is taken."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ZooError(f"Cannot listen on {host}, port {port} ({error}): pass other --host or --port.") from error
