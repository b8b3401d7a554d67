"""`dcp-zoo review` of what predict and inspect found, and `dcp-zoo undo` of what was changed."""

from pathlib import Path

from typer import Argument, Exit

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import log, output, print_error
from dcp_zoo.errors import ZooError
from dcp_zoo.files import LOCK, locked, printable


def review(
    page: Path = Argument(help="The page of predict --sheet, or the inspection.html of inspect."), port: opt.Port = 0
) -> None:
    """Correct predictions, or labels, on a page in the browser that saves each correction at once. Stop with Ctrl-C.

    The corrections are in corrections.csv, or of labels in changes.csv, next to the page. Images that predict sorted
    into folders move to the folder of the right class, and keywords that it wrote are changed; dcp-zoo undo takes that
    back. Nobody but you can open the page: its address works on this machine only, and has a secret.

    [dim]dcp-zoo review SORTED/sheet.html[/]
    [dim]dcp-zoo review MY_PHOTOS_inspection/inspection.html[/]
    """
    from dcp_zoo.deploy.bulk.review import Review, serve_review

    with locked(page.with_name(f".{page.name}{LOCK}")) as free:
        if not free:
            raise ZooError(f"Another process is reviewing {page}: use its page in the browser, or stop it.")
        found = Review(page)
        marked = f" {len(found.said):,} are there already." if found.said else ""
        output.print(f"Corrections are saved in {found.table}.{marked}", soft_wrap=True)
        serve_review(found, port, lambda url: print(f"Open {url} in the browser. Stop with Ctrl-C.", flush=True))


def undo(file: Path = Argument(help="The undo file that predict names, TABLE.undo.jsonl.")) -> None:
    """Take back what a run of predict with --move, --xmp or --xmp-embed did.

    Images and what belongs to them go where they were; sidecars and JPEGs are as they were. What was changed since
    stays, and the exit code is 1.

    [dim]dcp-zoo undo SORTED/predictions.undo.jsonl[/]
    """
    from dcp_zoo.deploy.bulk.journal import undo as take_back

    done, stay = take_back(file)
    for problem in stay:
        print_error(printable(problem))
    log(f"Taken back: {done:,} changes of files.")
    if stay:
        log(f"Not taken back: {len(stay):,}. Repeat the command when what is in their way is gone.")
        raise Exit(1)
