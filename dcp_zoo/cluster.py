"""Connections to a Ray cluster."""

import os
import socket
from contextlib import suppress
from typing import Any

from dcp_zoo.errors import ZooError, import_extra

LOCAL = "local"
CONNECT_SECONDS = 10
LOCAL_STARTS = 3


def connect(address: str, **local: Any) -> tuple[Any, bool]:
    """The connected ray module, and whether this call connected it; `local`: options of `ray.init` for "local"."""
    ray = import_ray()
    if ray.is_initialized():
        return ray, False
    try:
        _check_reachable(address)
        _init(ray, address, {"include_dashboard": False} | local if address == LOCAL else {})
    except Exception as error:  # Ray raises many types, including plain Exception
        token = " If it wants a token, set RAY_AUTH_MODE=token." if "AuthToken" in str(error.__cause__) else ""
        raise ZooError(
            f"No Ray cluster at {address!r}: {error}.{token} Start one with `ray start --head`, or use --ray local."
        ) from error
    return ray, True


def import_ray() -> Any:
    """The ray module, with the settings that it reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return import_extra("ray", "ray")


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Connect; a local start is retried, as Ray's timeout of 30 seconds is too short for a busy machine."""
    for attempt in range(LOCAL_STARTS if address == LOCAL else 1):
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
            return
        except Exception:
            ray.shutdown()
            if attempt == LOCAL_STARTS - 1 or address != LOCAL:
                raise


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing responds: Ray itself would retry for minutes and then exit the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def slots(ray: Any, cpus: float, gpus: float) -> int:
    """The number of tasks of this size that the live machines can run at once."""
    needs = {name: n for name, n in (("CPU", cpus), ("GPU", gpus)) if n}
    return sum(min(int(machine.get(name, 0) / n) for name, n in needs.items()) for machine in _machines(ray))


def check_fits(ray: Any, cpus: float, gpus: float, task: str, options: str) -> None:
    """Raise ZooError, naming the `options` to lower, if no machine is large enough for one `task`."""
    if slots(ray, cpus, gpus) == 0:
        found = "; ".join(f"{n.get('CPU', 0):g} cores, {n.get('GPU', 0):g} GPUs" for n in _machines(ray))
        raise ZooError(
            f"No machine of the cluster has {cpus:g} cores and {gpus:g} GPUs for {task} (found: {found or 'none'}). "
            f"Request less with {options}."
        )


def enter(folder: str) -> None:
    """Let a worker's relative paths start where the command's do. A machine without the folder needs no such paths."""
    with suppress(OSError):
        os.chdir(folder)


def _machines(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
