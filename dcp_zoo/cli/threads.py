"""The number of threads that compute, and how they wait for work."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


def wait_passively() -> None:
    """Let waiting threads sleep instead of spinning, which on a busy machine blocks the threads that they wait for.

    OpenMP reads this when torch is imported; settings of the user stay.
    """
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
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        cores = os.process_cpu_count() or 1
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, round(min(cores, cpu_quota())))


def cpu_quota() -> float:
    """Cores granted by the cgroups of this process, versions 1 and 2; infinite without a limit."""
    quotas = [float("inf")]
    for folder in _cgroup_folders():
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # this cgroup has no such file
            continue
    return min(quotas)


def _cgroup_folders() -> Iterator[Path]:
    """The folders of the cgroups that limit this process, inner ones first."""
    lines = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            root = CGROUPS / controllers
            own = root / path.lstrip("/")
            yield own
            yield from (parent for parent in own.parents if parent.is_relative_to(root))
