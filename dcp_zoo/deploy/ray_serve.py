"""The server's application on Ray Serve: the same endpoints, limits and batches, in replicas that a cluster runs."""

import logging
import os
import re
import signal
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcp_zoo.cluster import LOCAL, Resources, connected, enter, import_ray
from dcp_zoo.deploy.connections import CONNECTIONS
from dcp_zoo.deploy.limits import Limits, listen
from dcp_zoo.deploy.server import application
from dcp_zoo.errors import ZooError, import_extra

REPLICA_IMAGES = 16  # in progress for each replica, before another one is started


@contextmanager
def deployed(
    name: str,
    find: Callable[[], Path],
    limits: Limits,
    urls: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
    *,
    address: str = LOCAL,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int = 1,
) -> Iterator[str]:
    """The address of the application while it is deployed. At the end requests in progress are answered first.

    Characters of `name` that a file name may not have are replaced. `find` returns the exported file on the machine of
    a replica. `limits`, `urls`, `hosts` and `threads`, see `dcp_zoo.deploy.server.application`, are those of each
    replica, of which there are from one to as many as the cluster at `address` has room for. Machines with replicas
    listen at `host` and `port`, unless Ray Serve runs already; port 0 picks a free one here. ZooError if Ray Serve is
    not installed, without a cluster, for a replica that does not start, or another application at "/"."""
    import_ray()
    serve = import_extra("ray.serve", "ray")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    shown, name = name, re.sub(r"[^\w.-]", "-", name)  # Ray names log files after it
    if address == LOCAL:
        with listen(host, port) as free:
            port = free.getsockname()[1]
    folder = os.getcwd()  # noqa: PTH109

    def build() -> Any:
        enter(folder)
        return application(find(), limits, urls, threads, shown, hosts)

    with connected(address) as ray:
        replica = Resources(threads, gpus=0).fitted(ray, "one replica", "--threads")
        scale = {"min_replicas": 1, "target_ongoing_requests": REPLICA_IMAGES}
        deployment = serve.deployment(
            serve.ingress(build)(),
            name="classifier",
            ray_actor_options={"num_cpus": threads},
            max_ongoing_requests=CONNECTIONS,
            graceful_shutdown_timeout_s=limits.timeout,
            autoscaling_config=scale | {"max_replicas": replica.slots(ray)},
        )
        try:
            try:
                serve.start(http_options={"host": host, "port": port})
                serve.run(deployment.bind(), name=name)
            except Exception as error:  # Ray raises plain RuntimeErrors too
                raise ZooError(f"Ray Serve cannot run {name}: {error}") from error
            where = f"http://{host}:{port}"
            try:
                urllib.request.urlopen(f"{where}/health", timeout=5).close()
            except OSError:
                text = f"{where} does not answer from here: if Ray Serve ran already, its --port applies."
                warnings.warn(text, stacklevel=3)
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
