"""A contact sheet: a self-contained page with a few images and a note for each."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dcp_zoo.data.images import jpeg_base64, load_image
from dcp_zoo.files import printable, templates, write_file

SIDE = 160  # pixels of a picture's longer side


def thumbnails(paths: Sequence[str]) -> list[str]:
    """The images as small JPEGs in base64; PIL decodes outside the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: jpeg_base64(load_image(path), SIDE), paths))


def write_contact_sheet(file: Path, title: str, paths: Sequence[str], notes: Sequence[str]) -> None:
    """Write the page; ZooError if it is not writable, or an image cannot be read."""
    page = templates(__package__).get_template("sheet.html.jinja")
    pictures = zip(thumbnails(paths), map(printable, paths), notes, strict=True)
    write_file(file, page.render(title=printable(title), pictures=list(pictures)), "choose another file for the sheet")
