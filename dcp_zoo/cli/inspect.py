"""`dcp-zoo inspect`, `dcp-zoo search` and `dcp-zoo suggest`."""

from pathlib import Path

from rich.markup import escape
from typer import Argument, Option

from dcp_zoo.cli.console import log, output, progress_bar
from dcp_zoo.cli.options import Device, Labels, Model, Overwrite, Photos, Threads, data_source, head_name
from dcp_zoo.data.paths import check_output
from dcp_zoo.errors import ZooError
from dcp_zoo.files import check_writable
from dcp_zoo.threads import use_threads

MINIATURE = "dcp_mini knows names of everyday things, but does not understand sentences: pass --model dcp_vitb32."


def inspect(
    photos: Photos = None,
    labels: Labels = None,
    output_dir: Path | None = Option(None, "--output", help="Folder for page and table, or the copy of --fix."),
    fix: Path | None = Option(
        None,
        metavar="FILE.csv",
        help="Write a copy of the images to --output with the column `change` of this inspection.csv: the name of "
        "another class, or `leave out`. Nothing is changed in place.",
    ),
    overwrite: Overwrite = False,
    model: Model = "dcp_mini",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Look for wrong labels, duplicates and bad images before training, and say what accuracy to expect.

    Writes a page with pictures, and a CSV file with a row for each image.

    [dim]dcp-zoo inspect MY_PHOTOS[/]
    [dim]dcp-zoo inspect MY_PHOTOS --fix MY_PHOTOS_inspection/inspection.csv --output FIXED[/]
    """
    _, root = data_source(photos, None, None, labels)
    if root is None:
        raise ZooError("Pass a folder with one folder of images per class: dcp-zoo inspect MY_PHOTOS.")
    if fix is not None:
        if output_dir is None:
            raise ZooError("--fix needs a folder for the copy: pass --output FOLDER.")
        from dcp_zoo.inspection.inspection import fix as write_copy

        moved, left_out = write_copy(root, fix, output_dir, labels)
        output.print(f"Wrote {output_dir}. Images moved: {moved}, left out: {left_out}.")
        return
    folder = output_dir or Path(f"{root.resolve().name.partition('.')[0]}_inspection")
    use_threads(threads)
    from dcp_zoo.inspection.inspection import PAGE, TABLE
    from dcp_zoo.inspection.inspection import inspect as find

    for name in (TABLE, PAGE):
        check_output(folder / name, overwrite)

    found = find(root, labels, model=model, device=device, progress=progress_bar)
    page, table = found.write(folder)
    output.print(
        f"{len(found.suspects)} labels that may be wrong, {len(found.of_no_class)} images that may show none of the "
        f"classes, {len(found.groups)} groups of duplicates, {len(found.problems)} bad images."
    )
    output.print(f"Look at {page}; to change labels, edit {table}.")


def search(
    folder: Path = Argument(help="Folder with images, also in subfolders."),
    text: str | None = Argument(None, help="What to find, in words."),
    like: Path | None = Option(None, metavar="PHOTO", help="Find images that look like this one."),
    count: int = Option(20, min=1, help="How many images."),
    sheet: Path | None = Option(None, metavar="FILE.html", help="Write a page with the images as pictures."),
    overwrite: Overwrite = False,
    model: Model = "dcp_mini",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Find images by a text or by another image. Features are computed once and kept in the user's cache.

    [dim]dcp-zoo search MY_PHOTOS "tea cup" --sheet cups.html[/]
    [dim]dcp-zoo search MY_PHOTOS --like photo.jpg[/]
    """
    if sheet is not None:
        check_output(sheet, overwrite, "--sheet")
    use_threads(threads)
    from dcp_zoo.inspection.find import search as find

    found = find(folder, text, like=like, count=count, model=model, device=device, sheet=sheet, progress=progress_bar)
    for match in found:
        output.print(f"{match.similarity:.3f}  {escape(match.path)}", soft_wrap=True)
    if text and model == "dcp_mini":
        log(MINIATURE)


def suggest(
    unlabelled: Path = Argument(help="Folder with images, also in subfolders."),
    head: str | None = Option(None, help="Guesses the classes: a head, or a folder with a checkpoint."),
    labelled: Path | None = Option(None, metavar="FOLDER", help="Images with a label, which are not suggested again."),
    count: int = Option(20, min=1, help="How many images."),
    output_dir: Path | None = Option(None, "--output", help="New folder for table, page and links to sort."),
    model: Model = "dcp_mini",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Choose the images that are worth a label next: those that stand for most of the others.

    [dim]dcp-zoo suggest MY_PHOTOS --count 10 --output to_label[/]
    [dim]dcp-zoo suggest MY_PHOTOS --head my_head --labelled LABELLED --output to_label_next[/]
    """
    if output_dir is not None:
        check_writable(output_dir)
    use_threads(threads)
    from dcp_zoo.inspection.find import suggest as find

    options = {"labelled": labelled, "count": count, "output": output_dir, "model": model, "device": device}
    for row in find(unlabelled, head and head_name(head), **options, progress=progress_bar):  # type: ignore[arg-type]
        guess = "" if row.probability is None else f"{row.guess}? {100 * row.probability:.0f} %  "
        output.print(escape(f"{guess}{row.file}"), soft_wrap=True)
    if output_dir is not None:
        log(f"Move the images in {output_dir} into the right class folders: train takes such a folder.")
