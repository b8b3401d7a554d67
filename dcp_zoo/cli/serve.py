"""`dcp-zoo serve` and `dcp-zoo demo`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import log
from dcp_zoo.demo import DIGITS_HEAD, VisitorLimits, launch
from dcp_zoo.deploy.limits import Limits, allowed_hosts, listen
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.threads import available_cores


@dataclass(frozen=True)
class ServeOptions:
    """The options of `dcp-zoo serve`."""

    head: opt.HeadName
    port: opt.Port = 8000
    host: opt.Host = "127.0.0.1"
    classes: opt.Classes = None
    threads: opt.Threads = None
    allow_urls: list[str] = opt.option([], "Fetch images from addresses that begin with this, such as https://host/.")
    allow_hosts: list[str] = opt.option([], "Host names that clients may use besides localhost and --host.")
    ray: opt.Ray = None


@opt.takes_options
def serve(options: ServeOptions, limits: Limits) -> None:
    """Serve a head over HTTP with ONNX Runtime; images of concurrent requests form batches. Stop with Ctrl-C.

    --head may also be a file from dcp-zoo export. The page /docs describes the requests.

    [dim]dcp-zoo serve --head dcp_mini.caltech101-16shot[/]
    [dim]dcp-zoo serve --head model.onnx --host 0.0.0.0 --port 8080[/]
    [dim]dcp-zoo serve --head dcp_mini.caltech101-16shot --ray auto --threads 2[/]
    """
    for module in "onnxruntime fastapi uvicorn python_multipart prometheus_client fastapi_offline httpx".split():
        import_extra(module, "serve")
    from dcp_zoo.deploy.connections import server
    from dcp_zoo.deploy.onnx_cache import onnx_file
    from dcp_zoo.deploy.requests import check_prefix
    from dcp_zoo.deploy.server import application

    head, names = options.head, opt.class_list(options.classes)
    urls = [check_prefix(prefix) for prefix in options.allow_urls]
    hosts = allowed_hosts(options.host, options.allow_hosts)
    if head.endswith(".onnx") and names:
        raise ZooError("The classes of an exported file are fixed: export it again with --classes.")
    find = partial(Path, head) if head.endswith(".onnx") else partial(onnx_file, opt.head_name(head), names, log)
    host, port, threads = options.host, options.port, options.threads or (1 if options.ray else available_cores())

    def make() -> Any:
        return application(find(), limits, urls, threads, head, hosts)

    if options.ray:
        from dcp_zoo.deploy.ray_serve import deployed, wait_for_stop

        place: dict[str, Any] = {"address": options.ray, "host": host, "port": port}
        with deployed(head, make, limits.timeout, threads=threads, **place) as address:
            announce(head, address)
            wait_for_stop()
        return
    app, listening = make(), listen(host, port)
    announce(head, f"http://{host}:{listening.getsockname()[1]}")
    server(app, limits.timeout).run(sockets=[listening])


def announce(name: str, address: str) -> None:
    print(f"Serving {name} at {address} (requests: {address}/docs). Stop with Ctrl-C.", flush=True)


@opt.takes_options
def demo(
    limits: VisitorLimits,
    port: opt.Port = 7860,
    host: opt.Host = "127.0.0.1",
    head: opt.HeadName = DIGITS_HEAD,
) -> None:
    """Try heads in the browser: classify, look inside, train on a few photographs. Stop with Ctrl-C.

    [dim]dcp-zoo demo[/]
    [dim]dcp-zoo demo --head my_head --port 8000[/]
    """
    launch(opt.head_name(head), host, port, limits)
