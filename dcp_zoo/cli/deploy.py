"""`dcp-zoo export`, `dcp-zoo publish` and `dcp-zoo serve`."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from typer import Argument, Option

import dcp_zoo
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import log, output
from dcp_zoo.errors import ZooError, check_choice, import_extra
from dcp_zoo.files import check_empty, check_output, check_writable
from dcp_zoo.serve import Limits, allowed_hosts, listen, server
from dcp_zoo.threads import available_cores
from dcp_zoo.zoo.resolve import parse_name

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head


def export(
    head: opt.HeadName,
    file: Path | None = Option(None, "--output", help="The file or folder. Default: named after the head."),
    format: str = Option("onnx", help="onnx or hub (a repo)."),
    classes: opt.Classes = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Export a head to a file or a repo that works without this package, and verify it against the model.

    [dim]dcp-zoo export --head dcp_mini.caltech101-16shot --output caltech101.onnx[/]
    [dim]dcp-zoo export --head dcp_mini.caltech101-16shot --format hub --output my_repo[/]
    """
    names = opt.class_list(classes)
    check_choice("format", format, ("onnx", "hub"))
    if format == "hub":
        file = file or Path(f"{file_stem(head)}-hub")
        check_empty(file)
        check_writable(file.parent)
    else:
        file = file or Path(f"{file_stem(head)}.onnx")
        check_output(file, overwrite)
        check_choice("suffix", file.suffix, (".onnx",))
    model = exported(head, names, file, format)
    output.print(f"Wrote {file}, {model.num_classes} classes, and verified it against the model.", markup=False)


def exported(head: str, classnames: Sequence[str] | None, path: Path, format: str = "onnx") -> "Head":
    """Write a head to a file, or as a repo to a folder. Returns the head."""
    from dcp_zoo.release import export_hub
    from dcp_zoo.release.onnx import check_export

    check_export()
    model: Head = dcp_zoo.create_model(head, True, classnames=classnames).eval()
    write = export_hub if format == "hub" else dcp_zoo.export
    write(model, path)
    return model


def file_stem(head: str) -> str:
    """The name of a head for a file: that of its folder, of its Hub repo, or its own."""
    return Path(str(parse_name(head)).partition(":")[2] or head).resolve().name


def publish(
    folder: Path = Argument(metavar="FOLDER", help="A head's folder, as training writes it."),
    repo_id: str = Option(..., "--to", metavar="ORG/NAME", help="Repo of an organisation or user; created if needed."),
    data_root: opt.DataRoot = None,
    device: opt.Device = "auto",
    license: str = Option("apache-2.0", help="Licence of the trained weights, as the Hub calls it."),
    replaces: str | None = Option(None, metavar="ORG/NAME", help="An older head, whose card then points to this one."),
    dry_run: bool = Option(False, "--dry-run", help="Check the folder and show the card; upload nothing."),
) -> None:
    """Check a head's folder, write its model card, and upload both to the Hub, where anyone finds them.

    A NAME of the zoo's, such as dcp_vitb16.dtd-4shot, also enters the organisation's index. Such a head needs
    --data-root, as it is refused if it loses to zero-shot CLIP. CLIP's weights are not uploaded. Log in first
    with `hf auth login`, or set HF_TOKEN.

    [dim]dcp-zoo publish my_head --to ME/flowers --dry-run[/]
    [dim]dcp-zoo publish dcp_vitb16.dtd-4shot --to ORG/dcp_vitb16.dtd-4shot --data-root DATA[/]
    """
    from dcp_zoo.release.publish import check_accuracy, prepare, publish

    release = prepare(folder, repo_id, license)
    check_accuracy(release, data_root, device)
    if dry_run:
        print(release.card.content)
        log(f"The checkpoint is valid. It would be uploaded to {repo_id}; nothing was sent.")
        return
    commit = publish(release, replaces)
    output.print(f"Published. Anyone loads it as hf-hub:{repo_id}@{commit}", markup=False, soft_wrap=True)


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

    names = opt.class_list(classes)
    hosts = allowed_hosts(host, allow_hosts)
    limits = Limits(1e6 * max_mb)
    with TemporaryDirectory() as folder:
        if head.endswith(".onnx"):
            if names:
                raise ZooError("The classes of an exported file are fixed: export it again with --classes.")
            file = Path(head)
            shown_name = ""  # that in the file
        else:
            file = Path(folder, "model.onnx")
            log(f"Exporting {head}, which takes up to a minute: dcp-zoo export writes a file that starts at once.")
            exported(head, names, file)
            shown_name = file_stem(head)  # visitors need not know where it is
        app = application(file, limits, available_cores(), shown_name, hosts, device)
    listening = listen(host, port)
    address = f"http://{host}:{listening.getsockname()[1]}"
    print(f"Serving {head} at {address} (requests: {address}/docs). Stop with Ctrl-C.", flush=True)
    server(app, limits.timeout).run(sockets=[listening])
