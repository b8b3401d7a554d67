"""`dcp-zoo inspect` and `dcp-zoo search`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer import Argument, Option

import dcp_zoo
from dcp_zoo.cli.console import log, output, progress_bar
from dcp_zoo.cli.options import Device, GroupBy, Labels, Model, Overwrite, Photos, data_source
from dcp_zoo.data import load_labelled
from dcp_zoo.data.splits import group_by
from dcp_zoo.data.unreadable import unreadable_summary
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.files import check_output, check_outside, printable
from dcp_zoo.tables import INSPECTION_PAGE, INSPECTION_TABLE
from dcp_zoo.threads import use_threads


def inspect(
    photos: Photos = None,
    labels: Labels = None,
    groups: GroupBy = None,
    output_dir: Path | None = Option(None, "--output", help="Folder for page and table."),
    overwrite: Overwrite = False,
    model: Model = "dcp_mini",
    device: Device = "auto",
) -> None:
    """Look for wrong labels and duplicates before training, and say what accuracy to expect.

    Writes a page with pictures, and a CSV file with a row for each image: train --labels takes it, with your
    changes.

    [dim]dcp-zoo inspect MY_PHOTOS[/]
    """
    dataset, root = data_source(photos, None, labels)
    if dataset != "folder" or root is None:
        raise ZooError("Pass a folder with one folder of images per class: dcp-zoo inspect MY_PHOTOS.")
    folder = output_dir or Path(f"{root.resolve().name}_inspection")
    if not labels:
        check_outside(folder, root)
    for name in (INSPECTION_TABLE, INSPECTION_PAGE):
        check_output(folder / name, overwrite)
    data = load_labelled("folder", root, labels)
    if groups:
        data = group_by(data, groups)
    log(printable(data.note))
    use_threads()
    inspection = dcp_zoo.inspect(data, model=model, device=device, progress=progress_bar)
    page, table = inspection.write(folder)
    output.print(f"{inspection.summary[0].upper()}{inspection.summary[1:]}.")
    if inspection.seen.errors:
        log(printable(f"{unreadable_summary(data.items, inspection.seen.errors)}."))
    output.print(f"Look at {page}; to change labels, edit the column class of {table}", markup=False)


def search(
    folder: Path = Argument(help="Folder with images, also in subfolders."),
    text: str | None = Argument(None, metavar="[WHAT]", help="What to find: words, or a photo, for images like it."),
    to_label: bool = Option(False, "--to-label", help="Find what to label next: images that stand for most others."),
    labels: list[Path] | None = Option(
        None, metavar="FILE", help="With --to-label: images to omit, as they have a label; a table, or their folder."
    ),
    head: str | None = Option(None, help="With --to-label: guesses the classes; a head, or a checkpoint's folder."),
    count: int = Option(20, min=1, help="How many images."),
    output_dir: Path | None = Option(None, "--output", help="New folder for a page and a table."),
    model: Model = "dcp_mini",
    device: Device = "auto",
) -> None:
    """Find images by words, by another image, or to label them. Features are kept in the user's cache.

    [dim]dcp-zoo search MY_PHOTOS "tea cup" --output cups[/]
    [dim]dcp-zoo search MY_PHOTOS photo.jpg[/]
    [dim]dcp-zoo search MY_PHOTOS --to-label --count 10 --output to_label[/]
    [dim]dcp-zoo search MY_PHOTOS --to-label --head my_head --labels LABELLED --output to_label_next[/]
    """
    out_of_place = text if to_label else head or labels
    if out_of_place:
        raise ZooError("Pass what to find, or --to-label, which alone takes --head and --labels.")
    use_threads()
    from dcp_zoo.inspection.search import PAGE, TABLE

    options: Values = {
        "count": count,
        "output": output_dir,
        "model": model,
        "device": device,
        "progress": progress_bar,
    }
    found: Sequence[Any]
    if to_label:
        found = dcp_zoo.suggest(folder, head, labels=labels, **options)
    elif text and Path(text).is_file():
        found = dcp_zoo.search(folder, like=text, **options)
    else:
        found = dcp_zoo.search(folder, text, **options)
        if model == "dcp_mini":
            log("dcp_mini knows names of everyday things, but does not understand sentences: pass --model small.")
    for row in found:
        output.print(f"{row.note}  {row[0]}".lstrip(), markup=False, soft_wrap=True)
    if to_label and output_dir is not None:
        page = output_dir / PAGE
        table = output_dir / TABLE
        log(f"Look at {page}, fill in the column class of {table}, and pass the table to train --labels.")
