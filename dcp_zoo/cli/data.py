"""`dcp-zoo data`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..data import check
from .console import output

app = typer.Typer(help="Look at the data sets on disk.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at the data sets on disk."""


@app.command("check")
def check_(
    data_root: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder that holds the data sets in CoOp's layout.")
    ],
    verify_images: Annotated[bool, typer.Option("--verify-images", help="Decode every image; slow.")] = False,
) -> None:
    """Tell for each data set what is there, what is missing, whether the counts are right, and where to get the rest.

    [dim]dcp-zoo data check --data-root DATA[/]
    """
    table = Table("data set", "status", "train / val / test", "expected", "what to do", show_lines=True)
    colors = {"ok": "green", "missing": "dim", "broken": "red"}
    for row in check(data_root, verify_images):
        table.add_row(
            row.name, f"[{colors[row.status]}]{row.status}[/]", *map(_sizes, (row.found, row.expected)), row.message
        )
    output.print(table)


def _sizes(counts: tuple[int, ...] | None) -> str:
    return "" if counts is None else " / ".join(f"{n:,}" for n in counts)
