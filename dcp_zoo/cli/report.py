"""`dcp-zoo report`."""

from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import output


def report(
    folders: Annotated[list[Path], typer.Argument(help="Output folders of `dcp-zoo benchmark`.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output", help="Folder for the report. Default: `report` in the first folder.")
    ] = None,
) -> None:
    """Tables and learning curves of benchmark results: `report.md`, and `report.html` as one page for a browser.

    [dim]dcp-zoo report SWEEP[/]
    [dim]dcp-zoo report SWEEP OTHER_SWEEP --output REPORT[/]
    """
    from dcp_zoo.report import write_report

    for path in write_report(folders, output_dir or folders[0] / "report"):
        output.print(f"Wrote {path}", highlight=False)
