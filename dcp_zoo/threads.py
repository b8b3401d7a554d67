"""The number of threads that compute, and how they wait for work."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
SAMPLE = 0.1  # seconds
CPU_TIMES = Path("/proc/stat")  # Linux
spinning = False  # whether torch was imported before `wait_passively`


def wait_passively() -> None:
    """Let waiting threads sleep instead of spinning, which on a busy machine blocks the threads that they wait for.

    OpenMP reads this when torch is imported; settings of the user stay.
    """
    global spinning
    spinning = "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ
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
def fair_threads() -> Iterator[None]:
    """Inside this context torch computes with `use_threads(None)`; where its threads spin while they wait, with no more
    than there are free cores."""
    import torch

    before = torch.get_num_threads()
    use_threads(None)
    if spinning and torch.get_num_threads() > 1 and (busy := busy_cores()) > 0.5:
        free = max(1, round((os.cpu_count() or 1) - busy))
        torch.set_num_threads(min(torch.get_num_threads(), free))
        warnings.warn(
            f"Other programs use {busy:.1f} cores, so this takes longer. Import dcp_zoo before torch, so that torch's "
            "threads share the cores better.",
            stacklevel=4,
        )
    try:
        yield
    finally:
        torch.set_num_threads(before)


def busy_cores() -> float:
    """How many cores other processes use right now; 0 where the system does not tell."""
    if not CPU_TIMES.exists():
        return 0.0
    started, own, others = time.perf_counter(), time.process_time(), _busy_seconds()
    time.sleep(SAMPLE)
    used = _busy_seconds() - others - (time.process_time() - own)
    return max(0.0, used / (time.perf_counter() - started))


def _busy_seconds() -> float:
    """Seconds for which the machine's cores have worked since it started."""
    user_nice_system = CPU_TIMES.read_text().split(maxsplit=4)[1:4]
    return sum(map(int, user_nice_system)) / os.sysconf("SC_CLK_TCK")
