"""Ctrl-C in the middle of training."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_after_step(log: Callable[[str], object]) -> Iterator[Callable[[], bool]]:
    """While it is open, the first Ctrl-C makes the yielded function return True, and the second raises
    KeyboardInterrupt. Where Ctrl-C is handled by somebody else already, it stays so."""
    asked = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        log("Stopping after this step; Ctrl-C again stops at once.")

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
