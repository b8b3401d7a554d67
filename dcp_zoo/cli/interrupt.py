"""Ctrl-C during training."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_after_step(log: Callable[[str], object]) -> Iterator[Callable[[], bool]]:
    """Inside this context, the first Ctrl-C makes the yielded function return True, and the second raises
    KeyboardInterrupt. An existing handler of Ctrl-C is kept."""
    requested = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        log("Stopping after this step; press Ctrl-C again to stop at once.")

    installed = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if installed:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: requested
    finally:
        if installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
