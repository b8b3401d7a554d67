"""The number of threads that compute, and how they wait for work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


def wait_passively() -> None:
    """Let waiting threads sleep instead of spinning, which on a busy machine blocks the threads that they wait for.
    OpenMP reads this when torch is imported; settings of the user stay."""
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)


def use_threads(threads: int | None) -> None:
    """Let torch compute with this many threads in the whole process, that of a command; None keeps its own number, at
    most the cores of this process."""
    import torch

    torch.set_num_threads(threads or _own_threads())


def _own_threads() -> int:
    import torch

    return min(torch.get_num_threads(), available_cores())


def available_cores() -> int:
    """Cores that this process may use: those that the user, or Ray for its worker, grants by OMP_NUM_THREADS; or its
    affinity and the quota of its container."""
    granted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if granted.isdecimal() and int(granted):
        return int(granted)
    import joblib  # here, as it imports NumPy

    return joblib.cpu_count()


@contextmanager
def fair_threads(threads: int | None = None) -> Iterator[None]:
    """Inside this context torch computes with as many threads as `use_threads` sets, but in this thread alone: others
    that start meanwhile would take over what torch itself sets."""
    with _openmp().limit(limits=threads or _own_threads()):
        yield


@cache
def _openmp() -> Any:
    import torch  # noqa: F401  the libraries are those that are loaded now
    from threadpoolctl import ThreadpoolController  # which scikit-learn brings

    return ThreadpoolController().select(user_api="openmp")
