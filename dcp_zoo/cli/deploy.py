"""`dcp-zoo export`, `dcp-zoo serve` and `dcp-zoo demo`."""

import json
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from typer import Option

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import log, output
from dcp_zoo.errors import ZooError, check_choice, import_extra
from dcp_zoo.files import LOCK, cache_folder, check_empty, check_output, check_writable, locked, sha256_of
from dcp_zoo.heads.config import is_checkpoint, read_config
from dcp_zoo.serve import Limits, allowed_hosts, listen, server
from dcp_zoo.threads import available_cores
from dcp_zoo.zoo.registry import DEFAULT_HEAD
from dcp_zoo.zoo.resolve import head_folder, head_sha256

FOLDER = f"onnx-{version('dcp_zoo')}"  # in the user's cache, of heads that are served
WAIT = 300  # seconds, for another process that exports the same


def export(
    head: opt.HeadName,
    file: Path | None = Option(None, "--output", help="The file or folder. Default: named after the head."),
    format: str = Option("onnx", help="onnx or hub (a repo)."),
    classes: opt.Classes = None,
    preprocessing: str | None = Option(None, help="outside (default; -> logits) or inside (RGB -> probabilities)."),
    overwrite: opt.Overwrite = False,
) -> None:
    """Export a head to a file or a repo that works without this package, and verify it against the model.

    [dim]dcp-zoo export --head dcp_mini.caltech101-16shot --output caltech101.onnx[/]
    [dim]dcp-zoo export --head dcp_mini.caltech101-16shot --format hub --output my_repo[/]
    """
    from dcp_zoo.onnx import export as files
    from dcp_zoo.release import export_hub
    from dcp_zoo.zoo.factory import create_model

    name, names = opt.head_name(head), opt.class_list(classes)
    check_choice("format", format, ("onnx", "hub"))
    preprocessing = preprocessing or ("inside" if format == "hub" else "outside")
    files.check_export(preprocessing)
    if format == "hub":
        if preprocessing == "outside":
            raise ZooError("The format hub always has the preprocessing inside: omit --preprocessing.")
        file = file or Path(f"{file_stem(name)}-hub")
        check_empty(file)
        check_writable(file.parent)
        model = create_model(name, True, classnames=names).eval()
        path = export_hub(model, file)
        next_step = f"{path / 'README.md'} shows how to use it."
        output.print(f"Wrote {path}, {model.num_classes} classes. {next_step}", markup=False)
        return
    file = file or Path(f"{file_stem(name)}.onnx")
    file = file if file.suffix else file.with_suffix(".onnx")
    check_output(file, overwrite)
    check_choice("suffix", file.suffix, (".onnx",))
    model = create_model(name, True, classnames=names).eval()
    path = files.export(model, file, preprocessing=preprocessing)
    size = f"{path.stat().st_size / 1e6:.0f} MB, {model.num_classes} classes"
    output.print(f"Wrote {path} ({size}), verified against the model.", markup=False)


def file_stem(name: str) -> str:
    """The name of a head for a file: that of its folder, of its Hub repo, or its own."""
    kind, _, place = name.partition(":")
    return Path(place).resolve().name if kind == "local-dir" else name.rpartition("/")[2]


def serve(
    head: opt.HeadName,
    port: opt.Port = 8000,
    host: opt.Host = "127.0.0.1",
    classes: opt.Classes = None,
    device: opt.Device = "auto",
    max_mb: float = Option(20, min=0.001, help="Size of one request, in megabytes, at most."),
    allow_hosts: list[str] = Option((), help="Host names that clients may use besides localhost and --host."),
) -> None:
    """Serve a head over HTTP with ONNX Runtime, with batching across requests. Stop with Ctrl-C.

    --head may also be a file from dcp-zoo export. The page /docs describes the requests.

    [dim]dcp-zoo serve --head dcp_mini.caltech101-16shot[/]
    [dim]dcp-zoo serve --head my_head.onnx --host 0.0.0.0[/]
    """
    for module in "onnxruntime fastapi uvicorn python_multipart fastapi_offline".split():
        import_extra(module, "serve")
    from dcp_zoo.serve.app import application

    names, hosts = opt.class_list(classes), allowed_hosts(host, allow_hosts)
    if head.endswith(".onnx") and names:
        raise ZooError("The classes of an exported file are fixed: export it again with --classes.")
    if head.endswith(".onnx"):
        file, name = Path(head), ""  # the file has one
    else:
        file = onnx_file(opt.head_name(head), names)
        name = file_stem(opt.head_name(head)) if is_checkpoint(head) else head  # visitors need not know where it is
    limits = Limits(1e6 * max_mb)
    app = application(file, limits, available_cores(), name, hosts, device)
    listening = listen(host, port)
    address = f"http://{host}:{listening.getsockname()[1]}"
    print(f"Serving {head} at {address} (requests: {address}/docs). Stop with Ctrl-C.", flush=True)
    server(app, limits.timeout).run(sockets=[listening])


def onnx_file(name: str, classnames: Sequence[str] | None = None) -> Path:
    """The ONNX file of a head, see `head_folder`, or of its model with other classes, in the cache; exported if it is
    not there. ZooError as of `export`, for an unknown head, or a cache that is not writable."""
    folder = head_folder(name)
    hashes = [head_sha256(folder)]
    if read_config(folder)["dcp"]["clip"] == "bundled":
        hashes.append(sha256_of(MINI_WEIGHTS))
    depends_on = json.dumps([*hashes, list(classnames or [])])
    path = cache_folder(FOLDER) / f"{folder.name}-{sha256(depends_on.encode()).hexdigest()[:16]}.onnx"
    if not path.exists():
        check_writable(path.parent, "set DCP_ZOO_CACHE to another folder, or pass an exported file with --head")
        from dcp_zoo.onnx.export import check_export, export
        from dcp_zoo.zoo.factory import create_model

        check_export()
        with locked(path.with_name(f".{path.name}{LOCK}"), WAIT):  # of another process that exports it
            if not path.exists():
                log(f"Exporting {name} to ONNX, once, which takes up to a minute: {path}")
                export(create_model(name, True, classnames=classnames).eval(), path)
    return path


def demo(port: opt.Port = 7860, host: opt.Host = "127.0.0.1", head: opt.HeadName = DEFAULT_HEAD) -> None:
    """Try heads in the browser: train on a few photographs, classify, reject. Stop with Ctrl-C.

    [dim]dcp-zoo demo[/]
    [dim]dcp-zoo demo --head my_head --port 8000[/]
    """
    import_extra("gradio", "demo")
    from dcp_zoo.demo import launch

    launch(opt.head_name(head), host, port)
