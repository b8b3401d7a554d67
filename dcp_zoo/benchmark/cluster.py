"""A Ray cluster: connecting, what its machines have room for, and trials that are repeated when their worker dies."""

import os
import socket
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.fields import Values

LOCAL = "local"
CONNECT_SECONDS, LOCAL_STARTS = 10, 3


def import_ray() -> Any:
    """The ray module, with the settings that it reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return import_extra("ray", "ray")


@contextmanager
def connected(address: str = LOCAL, **local: object) -> Iterator[Any]:
    """The ray module while it is connected. `address`: "10.0.0.1:6379", "auto", or "local", started with `local`."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon and port.isdecimal():  # Ray itself would retry for minutes and then exit the process
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        _init(ray, address, {"include_dashboard": False} | local if address == LOCAL else {})
    except Exception as error:  # Ray raises many types, including plain Exception
        token = " If it wants a token, set RAY_AUTH_MODE=token." if "AuthToken" in str(error.__cause__) else ""
        raise ZooError(f"No Ray cluster at {address!r}: {error}.{token} To start one: --ray local.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _init(ray: ModuleType, address: str, options: Values) -> None:
    """Connect; a local start is retried, as Ray's timeout of 30 seconds is too short for a busy machine."""
    for attempt in range(LOCAL_STARTS if address == LOCAL else 1):
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
            return
        except Exception:
            ray.shutdown()
            if attempt == LOCAL_STARTS - 1 or address != LOCAL:
                raise


@dataclass(frozen=True)
class Resources:
    """The resources of one trial."""

    cpus: float = 1  # also the number of torch's threads
    gpus: float | None = None  # 0.5 puts two trials on a GPU; None: 1 if the cluster has GPUs, else 0
    retries: int = 2  # after a worker died, a machine was lost, or memory was exhausted

    def fitted(self, ray: ModuleType) -> "Resources":
        """The same with a definite number of GPUs; ZooError if no machine is large enough for a trial."""
        fitted = replace(self, gpus=float("GPU" in ray.cluster_resources())) if self.gpus is None else self
        needs = {"CPU": fitted.cpus, "GPU": fitted.gpus or 0}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(machine.get(name, 0) >= n for name, n in needs.items()) for machine in machines):
            found = "; ".join(f"{n.get('CPU', 0):g} cores, {n.get('GPU', 0):g} GPUs" for n in machines)
            needed = f"{fitted.cpus:g} cores and {fitted.gpus:g} GPUs for one trial (found: {found or 'none'})"
            raise ZooError(f"No machine of the cluster has {needed}. Request less with --per-trial.")
        return fitted


ONE_CORE = Resources()  # and a GPU, if the cluster has any


@dataclass(frozen=True)
class Event:
    """What has become of a task."""

    item: Any
    state: str  # "done"; "waiting" for another attempt; "lost", after the last one; a trial is also "failed" or "busy"
    message: str = ""  # why it waits or is lost
    result: Any = None  # of a task that is done; Ray's exception if it waits or is lost
    seconds: float = 0.0  # that a trial took


def run_tasks(
    work: Callable[[Any], Any], items: Iterable[Any], resources: Resources, address: str
) -> Generator[Event, None, None]:
    """Run `work(item)` for every item on a cluster, in this order and in this process's folder, where that exists.
    Closing the generator cancels what runs. What a worker keeps in its modules' variables stays for the next task."""
    folder, losses = os.getcwd(), Counter[object]()  # noqa: PTH109

    def on_worker(item: object) -> object:
        with suppress(OSError):  # so that relative paths start there; a machine without the folder needs no such paths
            os.chdir(folder)
        return work(item)

    with connected(address) as ray:
        resources = resources.fitted(ray)
        remote = ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_calls=0,  # otherwise a worker with a GPU would exit after each task
            max_retries=0,  # retries are counted here: Ray's have no end where memory is exhausted
        )(on_worker)
        running = {remote.remote(item): item for item in items}
        try:
            while running:
                for reference in ray.wait(list(running))[0]:
                    event = _ended(ray, reference, running.pop(reference), losses, resources.retries)
                    if event.state == "waiting":
                        running[remote.remote(event.item)] = event.item
                    yield event
        except ray.exceptions.RaySystemError as error:
            raise ZooError(f"Ray stopped ({error}). Finished work is kept: repeat the command to resume.") from error
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _ended(ray: ModuleType, reference: object, item: object, losses: Counter[object], retries: int) -> Event:
    """The event for a task that has ended; raises what it raised."""
    try:
        return Event(item, "done", result=ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ZooError) else error) from None
    except ray.exceptions.RayError as error:
        losses[item] += 1
        reason = f"Ray lost it ({type(error).__name__})"
        if losses[item] <= retries:
            return Event(item, "waiting", f"{reason}; attempt {losses[item] + 1} of {retries + 1} follows", error)
        return Event(item, "lost", f"{reason}, {losses[item]} times", error)
