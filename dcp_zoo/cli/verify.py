"""`dcp-zoo verify`."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dcp_zoo.cli.console import output, print_error, progress_bar
from dcp_zoo.cli.options import DataRoot, Device, Workers, head_name
from dcp_zoo.errors import ZooError


def verify(
    head: Annotated[
        str | None,
        typer.Option(help="A head, a checkpoint folder, or hf-hub:ORG/REPO."),
    ] = None,
    data_root: DataRoot = None,
    all_: Annotated[bool, typer.Option("--all", help="Verify all heads inside this package.")] = False,
    device: Device = "auto",
    workers: Workers = 0,
) -> None:
    """Measure a head again on the test images of its dataset, and compare with what its card claims.

    The exit code is 1 if an accuracy differs by more than 0.05 points, or a head of --all cannot be measured.

    [dim]dcp-zoo verify --head dcp_mini.caltech101-16shot --data-root DATA[/]
    [dim]dcp-zoo verify --all --data-root DATA[/]
    """
    if (head is None) != all_:
        raise ZooError("Pass one --head, or --all for those inside this package.")
    names = [head_name(head)] if head else []
    from dcp_zoo.release import verify as verifying

    table = Table("head", "stats", "claimed", "measured", "", box=None, pad_edge=False)
    claims, failed = [], False
    for name in names or verifying.bundled():
        try:
            claims += verifying.verify(name, data_root, device=device, workers=workers, progress=progress_bar)
        except ZooError as error:
            if head:
                raise
            failed = True  # the others can be measured all the same
            print_error(f"{name}: {error}")
    for claim in claims:
        verdict = "[green]holds[/]" if claim.holds else "[red]differs[/]"
        numbers = f"{claim.claimed:.2f}", f"{claim.measured:.2f}"
        table.add_row(escape(claim.head), claim.stats, *numbers, verdict)
    output.print(table)
    if failed or not all(claim.holds for claim in claims):
        raise typer.Exit(1)
