"""`dcp-zoo serve`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import log
from dcp_zoo.cli.options import Classes, HeadName, Ray, Threads, class_list, head_name, takes_options
from dcp_zoo.deploy.endpoint import DEFAULT_LIMITS, Limits, allowed_hosts, listen
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.threads import available_cores


@dataclass(frozen=True)
class ServeOptions:
    """The options of `dcp-zoo serve`."""

    head: HeadName
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1"
    classes: Classes = None
    threads: Threads = None
    max_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes of one request.")] = DEFAULT_LIMITS.max_bytes / 1e6
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of one image.")] = DEFAULT_LIMITS.max_pixels
    max_images: Annotated[int, typer.Option(min=1, help="Images of one request.")] = DEFAULT_LIMITS.max_images
    max_batch: Annotated[int, typer.Option(min=1, help="Images of one batch.")] = DEFAULT_LIMITS.max_batch
    max_waiting: Annotated[int, typer.Option(min=1, help="Images that may wait; others get 503.")] = (
        DEFAULT_LIMITS.max_waiting
    )
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds in which a request must arrive.")] = (
        DEFAULT_LIMITS.seconds
    )
    allow_urls: Annotated[
        list[str] | None,
        typer.Option(help="Fetch images from addresses that begin like this, as in https://host/. Default: from none."),
    ] = None
    allow_hosts: Annotated[
        list[str] | None,
        typer.Option(help="Names by which clients may call it, as in example.org. Default: localhost, and --host."),
    ] = None
    prepare: Annotated[bool, typer.Option("--prepare", help="Only export the head, as the first start does.")] = False
    ray: Ray = None


@takes_options
def serve(options: ServeOptions) -> None:
    """Serve a head over HTTP with ONNX Runtime; images of concurrent requests form batches. Stop with Ctrl-C.

    --head may also be a file from dcp-zoo export. The page /docs describes the requests.

    [dim]dcp-zoo serve --head dcp_mini.caltech101-16shot[/]
    [dim]dcp-zoo serve --head model.onnx --host 0.0.0.0 --port 8080[/]
    [dim]dcp-zoo serve --head dcp_mini.caltech101-16shot --ray auto --threads 2[/]
    """
    for module in ("onnxruntime", "fastapi", "uvicorn", "python_multipart", "prometheus_client", "fastapi_offline"):
        import_extra(module, "serve")
    import_extra("httpx", "serve")
    from dcp_zoo.deploy.connections import server
    from dcp_zoo.deploy.onnx_cache import onnx_file
    from dcp_zoo.deploy.requests import check_prefix
    from dcp_zoo.deploy.server import application

    head, names = options.head, class_list(options.classes)
    urls = [check_prefix(prefix) for prefix in options.allow_urls or ()]
    hosts = allowed_hosts(options.host, options.allow_hosts or ())
    if head.endswith(".onnx") and names:
        raise ZooError("The classes of an exported file are fixed: export it again with --classes.")
    find = partial(Path, head) if head.endswith(".onnx") else partial(onnx_file, head_name(head), names, log)
    if options.prepare:
        print(find())
        return
    limits = Limits(
        max_bytes=round(1e6 * options.max_mb),
        max_pixels=options.max_pixels,
        max_images=options.max_images,
        max_waiting=options.max_waiting,
        max_batch=options.max_batch,
        seconds=options.timeout,
    )
    if options.ray:
        from dcp_zoo.deploy.ray_serve import deployed, wait_for_stop

        place = {"address": options.ray, "host": options.host}
        with deployed(
            head, find, limits, urls, hosts, port=options.port, threads=options.threads or 1, **place
        ) as address:
            announce(head, address)
            wait_for_stop()
        return
    app = application(find(), limits, urls, options.threads or available_cores(), head, hosts)
    listening = listen(options.host, options.port)
    announce(head, f"http://{options.host}:{listening.getsockname()[1]}")
    server(app, limits.seconds).run(sockets=[listening])


def announce(name: str, address: str) -> None:
    print(f"Serving {name} at {address} (requests: {address}/docs). Stop with Ctrl-C.", flush=True)
