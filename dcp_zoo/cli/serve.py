"""`dcp-zoo serve` and `dcp-zoo demo`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dcp_zoo.cli.console import log
from dcp_zoo.cli.options import (
    Classes,
    HeadName,
    Host,
    Port,
    Ray,
    Threads,
    class_list,
    cli_option,
    head_name,
    takes_options,
)
from dcp_zoo.demo import DIGITS_HEAD, VisitorLimits, launch
from dcp_zoo.deploy.endpoint import DEFAULT_LIMITS, Limits, allowed_hosts, listen
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.threads import available_cores


@dataclass(frozen=True)
class ServeOptions:
    """The options of `dcp-zoo serve`."""

    head: HeadName
    port: Port = 8000
    host: Host = "127.0.0.1"
    classes: Classes = None
    threads: Threads = None
    limits: Limits = DEFAULT_LIMITS
    allow_urls: list[str] = cli_option(
        [], "Fetch images from addresses that begin with this, such as https://host/. Default: none."
    )
    allow_hosts: list[str] = cli_option(
        [], "Host names that clients may use, such as example.org. Default: localhost and --host."
    )
    ray: Ray = None


@takes_options
def serve(options: ServeOptions) -> None:
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

    head, names = options.head, class_list(options.classes)
    urls = [check_prefix(prefix) for prefix in options.allow_urls]
    hosts = allowed_hosts(options.host, options.allow_hosts)
    if head.endswith(".onnx") and names:
        raise ZooError("The classes of an exported file are fixed: export it again with --classes.")
    find = partial(Path, head) if head.endswith(".onnx") else partial(onnx_file, head_name(head), names, log)
    if options.ray:
        from dcp_zoo.deploy.ray_serve import deployed, wait_for_stop

        place: dict[str, Any] = {"address": options.ray, "host": options.host, "port": options.port}
        with deployed(head, find, options.limits, urls, hosts, threads=options.threads or 1, **place) as address:
            announce(head, address)
            wait_for_stop()
        return
    app = application(find(), options.limits, urls, options.threads or available_cores(), head, hosts)
    listening = listen(options.host, options.port)
    announce(head, f"http://{options.host}:{listening.getsockname()[1]}")
    server(app, options.limits.timeout).run(sockets=[listening])


def announce(name: str, address: str) -> None:
    print(f"Serving {name} at {address} (requests: {address}/docs). Stop with Ctrl-C.", flush=True)


@dataclass(frozen=True)
class DemoOptions:
    """The options of `dcp-zoo demo`."""

    port: Port = 7860
    host: Host = "127.0.0.1"
    head: HeadName = DIGITS_HEAD
    limits: VisitorLimits = VisitorLimits()


@takes_options
def demo(options: DemoOptions) -> None:
    """Try heads in the browser: classify, look inside, train on a few photographs. Stop with Ctrl-C.

    [dim]dcp-zoo demo[/]
    [dim]dcp-zoo demo --head my_head --port 8000[/]
    """
    launch(head_name(options.head), options.host, options.port, options.limits)
