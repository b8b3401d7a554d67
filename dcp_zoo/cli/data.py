"""`dcp-zoo data check` and `dcp-zoo data download`."""

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from typer import Argument, Exit, Option, Typer, confirm

from dcp_zoo.cli.console import output, plain_table, print_error
from dcp_zoo.cli.options import Agree, Command, ImagenetFrom
from dcp_zoo.data import DatasetSpec, check, find_spec
from dcp_zoo.data import download as downloads
from dcp_zoo.errors import ZooError

commands = Typer(help="Download datasets, and check those on disk.", no_args_is_help=True)


@commands.command("check", cls=Command)
def check_(
    data_root: Path | None = Option(None, exists=True, file_okay=False, help="Folder with the datasets."),
    dataset: list[str] = Option((), help="Only this one, or several; also folder."),
) -> None:
    """Check which datasets are present and complete, and show where to get the others.

    The exit code is 1 if a dataset is broken. Equal split hashes mean the same images in the same parts.

    [dim]dcp-zoo data check --data-root DATA[/]
    [dim]dcp-zoo data check --data-root MY_PHOTOS --dataset folder[/]
    """
    if data_root is None and not dataset:
        raise ZooError("Pass the folder with the datasets (--data-root DIR), or one to check (--dataset NAME).")
    rows = check(data_root, dataset)
    names = ("dataset", "status", "train", "val", "test", "split sha256")
    cells = [(r.name, r.status, *map("{:,}".format, r.found or ()), r.sha256[:12]) for r in rows]
    output.print(plain_table(names, cells))
    broken, missing = ([row for row in rows if row.status == status] for status in ("broken", "missing"))
    lines = [f"[red]{escape(row.name)}:[/] {escape(row.message)}" for row in broken]
    lines += [escape(row.note) for row in rows if row.note]
    if missing:
        lines += ["[bold]Where to get missing datasets[/] (most of them with dcp-zoo data download NAME)"]
        specs = [find_spec(row.name) for row in missing]
        lines += [f"  {f'{spec.folder}/{spec.images}':51}{spec.source}" for spec in specs]
    for line in lines:
        output.print(line, soft_wrap=True)
    if broken:
        raise Exit(1)


@commands.command(cls=Command)
def download(
    names: list[str] = Argument(metavar="NAME...", help="Datasets, or `all`."),
    data_root: Path = Option(help="Folder for the datasets; each gets a folder in CoOp's layout."),
    agree: Agree = False,
    imagenet_from: ImagenetFrom = None,
) -> None:
    """Download datasets, unpack them in CoOp's layout, and check them. CoOp's splits are part of this package.

    Complete datasets are skipped; a stopped download of a file with a checksum continues.

    [dim]dcp-zoo data download caltech101 dtd --data-root DATA[/]
    [dim]dcp-zoo data download all --data-root DATA --imagenet-from TARS[/]
    """
    chosen = downloads.downloadable() if names == ["all"] else names
    specs = downloads.missing(chosen, data_root)
    if failed := download_all(specs, data_root, agree, imagenet_from):
        raise ZooError(f"Not complete: {', '.join(failed)}. Repeat the command to resume.")
    output.print(f"All of {', '.join(chosen)} are in {data_root}.", soft_wrap=True)


def download_all(specs: Sequence[DatasetSpec], data_root: Path, agree: bool, imagenet_from: str | None) -> list[str]:
    """Download datasets, once their terms are agreed to; the names of those that could not be."""
    for spec in specs:
        output.print(f"[bold]{spec.name}[/]: {escape(spec.terms)}\n  {escape(spec.source)}", soft_wrap=True)
    if specs and not agree and not confirm("Do you agree to these terms?"):
        raise ZooError("Nothing was downloaded: read the terms on the pages above, and agree to them.")
    failed = []
    for spec in specs:
        try:
            row = downloads.download_dataset(spec, data_root, imagenet_from)
            output.print(f"{spec.name}: complete, split sha256 {row.sha256[:12]}")
        except ZooError as error:  # the others can continue
            failed.append(spec.name)
            print_error(f"{spec.name}: {error}")
    return failed
