"""The number of threads that compute, and how they wait for work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


def wait_passively() -> None:
    """Let waiting threads sleep instead of spinning, which on a busy machine blocks the threads that they wait for.
    OpenMP reads this when torch is imported; settings of the user stay."""
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)


def use_threads(threads: int | None) -> None:
    """Let torch compute with this many threads; None keeps its own number, at most the cores of this process."""
    import torch

    if threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(threads or min(torch.get_num_threads(), available_cores()))


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    import joblib  # here, as it imports NumPy

    return joblib.cpu_count()


@contextmanager
def fair_threads(threads: int | None = None) -> Iterator[None]:
    """Inside this context torch computes with `use_threads(threads)`."""
    import torch

    before = torch.get_num_threads()
    use_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
