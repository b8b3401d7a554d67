"""What the requests in progress may hold together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Full(Exception):
    """More is in progress than the server takes on."""


class Budget:
    """An amount of bytes or pixels. A request may hold as much as it leaves free: the fuller it is, the smaller further
    requests must be, and large ones do not shut out small ones."""

    def __init__(self, total: int) -> None:
        self.free = total

    @contextmanager
    def share(self) -> Iterator[Callable[..., None]]:
        """take(amount, at_least=0) for one request, until the context ends. It raises `Full` if the request cannot have
        so much more, or `at_least` so much in all."""
        held = 0

        def take(amount: int, at_least: int = 0) -> None:
            nonlocal held
            if 2 * max(held + amount, at_least) > self.free + held:
                raise Full
            held += amount
            self.free -= amount

        try:
            yield take
        finally:
            self.free += held
