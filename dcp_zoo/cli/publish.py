"""`dcp-zoo publish`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import log, output


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
    output.print(f"Published as {release.repo_id} at {revision}.", highlight=False)
    entries = {release.head.name: release.entry(revision)}
    if publishing.pin(entries):
        output.print(f"Pinned in {publishing.MANIFEST}: commit it.", highlight=False)
    else:
        text = json.dumps(entries, indent=1)
        output.print(f"To pin it, add this to dcp_zoo/zoo/heads.json in a source checkout:\n{text}", highlight=False)
