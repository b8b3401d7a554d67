"""`dcp-zoo publish`, `dcp-zoo verify` and `dcp-zoo submit`: heads and results that others see."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import log, output, plain_table, print_error, progress_bar
from dcp_zoo.cli.options import DataRoot, Device, Workers, head_name
from dcp_zoo.errors import ZooError, import_extra


def publish(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Checkpoint folder of one of the zoo's heads, written by training.")
    ],
    org: Annotated[str, typer.Option(help="Organisation or user on the Hub.")],
    license: Annotated[str, typer.Option(help="Licence of the trained weights.")] = "apache-2.0",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and show the card; upload nothing.")
    ] = False,
) -> None:
    """Check a trained head, write its model card, upload it to the Hub, and pin it in the manifest.

    [dim]dcp-zoo publish dcp_vitb16.imagenet-16shot --org MY_ORG --dry-run[/]

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from dcp_zoo.release import publish as publishing

    release = publishing.prepare(folder, org, license)
    if dry_run:
        print(release.card.content)
        log(f"The checkpoint is valid. It would be uploaded to {release.repo_id}; nothing was sent.")
        return
    revision = publishing.publish(release)
    output.print(f"Published as {release.repo_id} at {revision}.")
    entries = {release.head.name: release.entry(revision)}
    if publishing.pin(entries):
        output.print(f"Pinned in {publishing.MANIFEST}: commit it.")
    else:
        text = json.dumps(entries, indent=1)
        output.print(f"To pin it, add this to dcp_zoo/zoo/heads.json in a source checkout:\n{text}")


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

    claims, failed = [], False
    for name in names or verifying.bundled():
        try:
            claims += verifying.verify(name, data_root, device=device, workers=workers, progress=progress_bar)
        except ZooError as error:
            if head:
                raise
            failed = True  # the others can be measured all the same
            print_error(f"{name}: {error}")
    rows = [
        (c.head, c.stats, f"{c.claimed:.2f}", f"{c.measured:.2f}", "holds" if c.holds else "differs") for c in claims
    ]
    output.print(plain_table(("head", "stats", "claimed", "measured", ""), rows))
    if failed or not all(claim.holds for claim in claims):
        raise typer.Exit(1)


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
    output.print(f"Admitted; its accuracy {state}. Add this row to benchmarks/leaderboard in a pull request.")
