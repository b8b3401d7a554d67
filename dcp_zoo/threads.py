"""The number of threads that compute, and how they wait for work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


def wait_passively() -> None:
    """Let waiting threads sleep, not spin, which would keep a core busy; OpenMP reads this when torch is
    imported. For the package's own processes: what is set stays set."""
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)


def use_threads() -> None:
    """Let torch compute in the whole process with its own number of threads, at most the cores."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def available_cores() -> int:
    """Cores that this process may use: those that OMP_NUM_THREADS grants, or its affinity and its
    container's quota."""
    granted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if granted.isdecimal() and int(granted):
        return int(granted)
    import joblib  # here, as it imports NumPy

    return joblib.cpu_count()


@contextmanager
def fair_threads(threads: int | None = None) -> Iterator[None]:
    """Inside this context torch computes with as many threads as `use_threads` sets, but in this thread
    alone."""
    import torch

    with _openmp().limit(limits=threads or min(torch.get_num_threads(), available_cores())):
        yield


@cache
def _openmp() -> Any:
    import torch  # noqa: F401  the libraries are those that are loaded now
    from threadpoolctl import ThreadpoolController  # which scikit-learn brings

    return ThreadpoolController().select(user_api="openmp")
