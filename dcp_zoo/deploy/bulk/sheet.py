"""A contact sheet: one HTML file with the images of each class, the least certain first."""

import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dcp_zoo.data.find import Found
from dcp_zoo.data.images import jpeg_base64, load_image
from dcp_zoo.deploy.bulk.job import Row, label
from dcp_zoo.files import templates

PER_CLASS = 60  # images shown of a class: the sheet of a million images must open in a browser
SIZE = 128  # pixels of a thumbnail's longer side


@dataclass
class Group:
    """One class: how many images it has, and a heap of the least certain, (-probability, -index, row)."""

    count: int = 0
    shown: list[tuple[float, int, Row]] = field(default_factory=list)

    def add(self, index: int, row: Row) -> None:
        self.count += 1
        entry = (-row["predictions"][0]["probability"], -index, row)
        (heapq.heappush if len(self.shown) < PER_CLASS else heapq.heappushpop)(self.shown, entry)


def write_sheet(path: Path, images: Sequence[Found], rows: Iterable[Row], temporary: str) -> None:
    """Write the contact sheet of these rows.

    Args:
        path: where the sheet will be: its pictures link to the image files from there.
        images: the images of the rows.
        rows: see `classify`.
        temporary: the file to write.
    """
    groups: dict[str, Group] = {}
    errors = []
    for index, row in enumerate(rows):
        if "error" in row:
            errors.append(row)
        else:
            groups.setdefault(label(row), Group()).add(index, row)
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter lock
        classes = (
            {"name": name, "count": group.count, "pictures": _pictures(pool, path.parent, images, group)}
            for name, group in sorted(groups.items())
        )
        counts = [(name, group.count) for name, group in sorted(groups.items())]
        page = templates(__package__).get_template("sheet.html.jinja")
        page.stream(classes=classes, counts=counts, errors=errors, total=len(images), per_class=PER_CLASS).dump(
            temporary, "utf-8", "replace"
        )


def _pictures(
    pool: ThreadPoolExecutor, folder: Path, images: Sequence[Found], group: Group
) -> Iterator[dict[str, Any]]:
    """The pictures of one class, the least certain first."""
    entries = [(images[-index], row) for _, index, row in sorted(group.shown, reverse=True)]
    thumbnails = pool.map(lambda entry: jpeg_base64(load_image(entry[0].path), SIZE, quality=70), entries)
    for (image, row), thumbnail in zip(entries, thumbnails, strict=True):
        yield {
            "thumbnail": thumbnail,
            "name": os.path.basename(image.name),  # noqa: PTH119
            "path": image.name,
            "link": None if "://" in image.path else _link(image.path, folder),
            "predictions": row["predictions"][:2],
        }


def _link(path: str, folder: Path) -> str:
    """The address of an image file on a page in the folder."""
    try:
        return quote(os.fsencode(os.path.relpath(path, folder)))
    except ValueError:  # on another drive of Windows
        return Path(path).absolute().as_uri()
