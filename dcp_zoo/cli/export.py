"""`dcp-zoo export`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import output
from dcp_zoo.cli.options import Classes, Head, check_output, class_list, head_name
from dcp_zoo.errors import ZooError, check_choice


def export(
    head: Head,
    file: Annotated[
        Path | None, typer.Option("--output", help="The file. Default: the head's name plus a suffix.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="onnx, torch-export or safetensors. Default: by the suffix of --output, otherwise onnx."),
    ] = None,
    classes: Classes = None,
) -> None:
    """Export a head to a single file that works without this package, and verify it against the model.

    [dim]dcp-zoo export --head dcp_mini.caltech101-16shot --output caltech101.onnx[/]
    [dim]dcp-zoo predict photo.jpg --onnx caltech101.onnx[/]
    """
    name, names = head_name(head), class_list(classes)
    from dcp_zoo.deploy.export import SUFFIXES, check_extras
    from dcp_zoo.deploy.export import export as write
    from dcp_zoo.zoo.factory import create_model

    format = export_format(file, format, SUFFIXES)
    file = file or Path(file_stem(name) + SUFFIXES[format])
    check_output(file.parent)
    check_extras(format)
    model = create_model(name, True, classnames=names).eval()
    path = write(model, file, format)
    megabytes = path.stat().st_size / 1e6
    output.print(f"Wrote {path} ({megabytes:.0f} MB, {model.num_classes} classes), verified against the model.")


def export_format(file: Path | None, format: str | None, suffixes: Mapping[str, str]) -> str:
    """The format of an export: --format, otherwise the one of the file's suffix, otherwise onnx.

    Raises:
        ZooError: an unknown format or suffix, or a format and the suffix of another one.
    """
    suffix = file.suffix if file else ""
    by_suffix = next((name for name, known in suffixes.items() if known == suffix), None)
    if format is None:
        if suffix and by_suffix is None:
            raise ZooError(
                f"No format has the suffix {suffix}: choose {', '.join(suffixes.values())}, or pass --format."
            )
        return by_suffix or "onnx"
    check_choice("format", format, tuple(suffixes))
    if by_suffix not in (None, format):
        raise ZooError(f"--format {format} contradicts {file}, which is named like {by_suffix}: omit one of them.")
    return format


def file_stem(name: str) -> str:
    """The name of a head for a file: that of its folder, of its Hub repo, or its own."""
    kind, _, place = name.partition(":")
    return Path(place).resolve().name if kind == "local-dir" else name.rpartition("/")[2]
