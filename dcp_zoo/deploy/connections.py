"""Connections that shut nobody out. uvicorn has no deadline for headers, and beyond its limit it refuses the newest
connection, not the slowest one."""

import asyncio
import heapq
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

CONNECTIONS = 512
AT_ONCE = 16  # that are closed beyond it, as looking for them takes time
HEADER_SECONDS = 10  # in which the header of a request must arrive; also those for which a connection may be idle


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, with a deadline: a connection without a request in progress is closed after `HEADER_SECONDS`,
    whatever arrives on it. Beyond `CONNECTIONS`, those are closed that have waited longest for their clients: for a
    header, or else for a body or for the answer to be read."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.since = self.loop.time()
        self.loop.call_later(HEADER_SECONDS, self.check)
        if len(self.connections) > CONNECTIONS:
            waiting = [other for other in self.connections if other is not self and other.waits] or [self]
            for other in heapq.nsmallest(AT_ONCE, waiting, key=lambda other: (other.asked, other.since)):
                other.transport.abort()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    @property
    def asked(self) -> bool:
        """Whether a request is in progress."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether the client has to go on."""
        return not self.transport.is_closing() and (
            not self.asked or self.cycle.more_body or self.cycle.response_started
        )

    def check(self) -> None:
        left = self.since + HEADER_SECONDS - self.loop.time()
        if self.transport.is_closing():
            return
        if not self.asked and left <= 0:
            self.transport.abort()
        else:
            self.loop.call_later(max(left, 1), self.check)


def server(app: Any, shutdown_seconds: float) -> uvicorn.Server:
    """A server that, when it is stopped, first answers the requests in progress, for so many seconds at most."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_level="warning",
        timeout_keep_alive=HEADER_SECONDS,
        timeout_graceful_shutdown=round(shutdown_seconds),
    )
    return uvicorn.Server(config)
