"""`dcp-zoo submit`."""

from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import output, progress_bar
from dcp_zoo.cli.options import DataRoot, Device, Workers
from dcp_zoo.errors import import_extra


def submit(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder with submission.yaml, and the head if there is one."),
    ],
    data_root: DataRoot = None,
    device: Device = "auto",
    workers: Workers = 0,
) -> None:
    """Check a result for the leaderboard against the admission rules, measure its head, and print the row to submit.

    [dim]dcp-zoo submit MY_RESULT --data-root DATA[/]
    """
    import_extra("pydantic", "submit")
    from dcp_zoo.release.submission import check_submission

    row = check_submission(folder, data_root, device=device, workers=workers, progress=progress_bar)
    print(row.model_dump_json(indent=1))
    state = "was measured here" if row.measured is not None else "was not measured here: the folder has no checkpoint"
    output.print(
        f"Admitted; its accuracy {state}. Add this row to benchmarks/leaderboard in a pull request.", highlight=False
    )
