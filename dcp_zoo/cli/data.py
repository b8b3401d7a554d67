"""`dcp-zoo data`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dcp_zoo.cli.console import output
from dcp_zoo.data import CheckRow, check, find_spec
from dcp_zoo.data.splits import COOP
from dcp_zoo.errors import ZooError

app = typer.Typer(help="Check the datasets on disk.", no_args_is_help=True)
COLORS = {"ok": "green", "missing": "dim", "broken": "red"}


@app.callback()
def data() -> None:
    """Check the datasets on disk."""


@app.command("check")
def check_(
    data_root: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder with the datasets in CoOp's layout."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Only this one (may be repeated); also folder, hf://datasets/ORG/NAME or wds://PATH."),
    ] = None,
    verify_images: Annotated[
        bool, typer.Option("--verify-images", help="Decode every image; otherwise only their headers are read.")
    ] = False,
) -> None:
    """Check which datasets are present and complete, and show where to get the others.

    The exit code is 1 if a dataset is broken. Equal split hashes mean the same images in the same parts.

    [dim]dcp-zoo data check --data-root DATA[/]
    [dim]dcp-zoo data check --data-root MY_PHOTOS --dataset folder --verify-images[/]
    [dim]dcp-zoo data check --dataset hf://datasets/ORG/NAME[/]
    """
    if data_root is None and not dataset:
        raise ZooError("Pass the folder with the datasets (--data-root DIR), or one to check (--dataset NAME).")
    rows = check(data_root, verify_images, dataset)
    table = Table("dataset", "status", box=None, pad_edge=False)
    for part in ("train", "val", "test"):
        table.add_column(part, justify="right")
    table.add_column("split sha256")
    for row in rows:
        name = row.name.rpartition("/")[2]
        table.add_row(escape(name), f"[{COLORS[row.status]}]{row.status}[/]", *_sizes(row), row.sha256[:12])
    output.print(table)
    _explain(rows)
    if any(row.status == "broken" for row in rows):
        raise typer.Exit(1)


def _sizes(row: CheckRow) -> list[str]:
    """Image counts of train, val and test; if one differs from the expected count, both in red."""
    sizes = []
    for found, expected in zip(row.found or (None,) * 3, row.expected or (None,) * 3, strict=True):
        if found is None:
            sizes.append("" if expected is None else f"[dim]of {expected:,}[/]")
        else:
            wrong = expected not in (None, found)
            sizes.append(f"[red]{found:,} of {expected:,}[/]" if wrong else f"{found:,}")
    return sizes


def _explain(rows: list[CheckRow]) -> None:
    """Print below the table: problems, notes on the splits, and where to get missing datasets."""
    lines = [f"[red]{escape(row.name)}:[/] {escape(row.message)}" for row in rows if row.status == "broken"]
    lines += [escape(row.note) for row in rows if row.note]
    missing = [row for row in rows if row.status == "missing"]
    if missing:
        lines += [f"[bold]Where to get missing datasets[/] (layout and split files: {COOP})"]
        for spec in (find_spec(row.name) for row in missing):
            lines.append(f"  {f'{spec.folder}/{spec.images}':51}{spec.source}")
    for line in lines:
        output.print(line, highlight=False, soft_wrap=True)
