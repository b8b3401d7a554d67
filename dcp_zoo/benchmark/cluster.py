"""Sweeps on a Ray cluster: connecting, what its machines have room for, and trials that are repeated when their worker
dies."""

import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from dcp_zoo.benchmark import store, sweep
from dcp_zoo.benchmark.plan import Settings, Trial
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


def sweep_on_ray(
    trials: Sequence[Trial], settings: Settings, *, address: str = LOCAL, resources: Resources = Resources()
) -> Iterator[sweep.Event]:
    """Run trials on a cluster and yield their events, in this process's folder where that exists. Each writes its
    result to the sweep's folder, which all machines must share, so that if this process dies, only running trials are
    lost. Closing the generator cancels what runs. Workers are reused, with the images they have prepared."""
    folder, lost, execute = os.getcwd(), Counter[Trial](), sweep.execute  # noqa: PTH109

    def on_worker(trial: Trial) -> sweep.Event:
        with suppress(OSError):  # so that relative paths start there; a machine without the folder needs no such paths
            os.chdir(folder)
        return execute(trial, settings)

    with connected(address) as ray:
        resources = resources.fitted(ray)
        remote = ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_calls=0,  # otherwise a worker with a GPU would exit after each task
            max_retries=0,  # retries are counted here: Ray's have no end where memory is exhausted
        )(on_worker)
        running = {remote.remote(trial): trial for trial in longest_first(trials)}
        try:
            while running:
                for reference in ray.wait(list(running))[0]:
                    trial = running.pop(reference)
                    event = _ended(ray, reference, trial, settings, lost, resources.retries)
                    if event.state == "waiting":
                        running[remote.remote(trial)] = trial
                    yield event
        except ray.exceptions.RaySystemError as error:
            raise ZooError(f"Ray stopped ({error}). Finished work is kept: repeat the command to resume.") from error
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def longest_first(trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials by training steps: a long one that starts last would keep all other machines waiting. Trials without
    training still come first; they reveal missing files early."""
    return sorted(trials, key=lambda trial: (trial.shots > 0, -trial.steps))


def _ended(
    ray: ModuleType, reference: object, trial: Trial, settings: Settings, lost: Counter[Trial], retries: int
) -> sweep.Event:
    """The event of a trial that has ended; it has failed if Ray lost it too often. Raises what the worker raised."""
    try:
        event: sweep.Event = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ZooError) else error) from None
    except ray.exceptions.RayError as error:
        lost[trial] += 1
        reason = f"Ray lost it ({type(error).__name__})"
        if lost[trial] <= retries:
            return sweep.Event(trial, "waiting", f"{reason}; attempt {lost[trial] + 1} of {retries + 1} follows")
        reason = f"{reason}, {lost[trial]} times"
        store.save_failure(settings.output, trial, reason, str(error))
        return sweep.Event(trial, "failed", reason)
    if event.state == "done" and trial.key not in store.done(settings.output):
        problem = f"A worker has finished {trial.key}, but its result is not in {settings.output}."
        raise ZooError(f"{problem} --output must be a folder shared by all machines of the cluster.")
    return event
