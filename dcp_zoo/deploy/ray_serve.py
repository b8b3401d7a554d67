"""The server's application on Ray Serve: the same endpoints, limits and batches, in replicas that a cluster runs."""

import logging
import os
import re
import signal
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from dcp_zoo.cluster import LOCAL, Resources, connected, enter, import_ray
from dcp_zoo.deploy.limits import listen
from dcp_zoo.errors import as_zoo_error, import_extra

MOST_REQUESTS = 512  # in progress in a replica; others wait
REPLICA_IMAGES = 16  # in progress for each replica, before another one is started


@contextmanager
def deployed(
    name: str, make: Callable[[], FastAPI], shutdown_seconds: float, *, address: str, host: str, port: int, threads: int
) -> Iterator[str]:
    """The address of an application, which `make` returns on each machine, while it is deployed; then requests in
    progress are answered. As many replicas as the cluster has room for, each with so many `threads`, listen at `host`
    and `port`, unless Ray Serve runs already; port 0 picks a free one here."""
    import_ray()
    serve = import_extra("ray.serve", "ray")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    name, folder = re.sub(r"[^\w.-]", "-", name), os.getcwd()  # noqa: PTH109  Ray names log files after it
    if address == LOCAL:
        with listen(host, port) as free:
            port = free.getsockname()[1]

    def build() -> FastAPI:
        enter(folder)
        return make()

    with connected(address) as ray:
        replica = Resources(threads, gpus=0).fitted(ray, "one replica", "--threads")
        scale = {"min_replicas": 1, "target_ongoing_requests": REPLICA_IMAGES}
        deployment = serve.deployment(
            serve.ingress(build)(),
            name="classifier",
            ray_actor_options={"num_cpus": threads},
            max_ongoing_requests=MOST_REQUESTS,
            graceful_shutdown_timeout_s=shutdown_seconds,
            autoscaling_config=scale | {"max_replicas": replica.slots(ray)},
        )
        try:
            with as_zoo_error(f"Ray Serve cannot run {name}: {{}}", Exception):  # Ray raises plain RuntimeErrors too
                serve.start(http_options={"host": host, "port": port})
                serve.run(deployment.bind(), name=name)
            where = f"http://{host}:{port}"
            try:
                urllib.request.urlopen(f"{where}/health", timeout=5).close()
            except OSError:
                warnings.warn(f"{where} does not answer: if Ray Serve ran already, its --port applies.", stacklevel=3)
            yield where
        finally:
            if name in serve.status().applications:
                serve.delete(name)
            if not serve.status().applications:
                serve.shutdown()


def wait_for_stop() -> None:
    """Return at Ctrl-C or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
