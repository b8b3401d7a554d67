"""`dcp-zoo report`."""

from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import output
from dcp_zoo.cli.options import check_output
from dcp_zoo.errors import import_extra


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Output folders of `dcp-zoo benchmark`, or the results.csv in them."),
    ],
    output_dir: Annotated[
        Path | None, typer.Option("--output", help="Folder for the report. Default: `report` in the first folder.")
    ] = None,
) -> None:
    """Write tables and learning curves of benchmark results to `report.md` and `report.html`, a self-contained page.

    [dim]dcp-zoo report SWEEP[/]
    [dim]dcp-zoo report SWEEP OTHER_SWEEP --output REPORT[/]
    """
    folders = [place.parent if place.name == "results.csv" else place for place in folders]
    output_dir = output_dir or folders[0] / "report"
    check_output(output_dir)
    for module in ("pandas", "matplotlib"):
        import_extra(module, "plots")
    from dcp_zoo.benchmark.report import write_report

    for path in write_report(folders, output_dir):
        output.print(f"Wrote {path}", highlight=False)
