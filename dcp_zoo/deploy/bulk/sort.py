"""Folder in, folders out: every image into a folder named after its class."""

import filecmp
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

from dcp_zoo.data.find import Found
from dcp_zoo.deploy.bulk.job import Row, label
from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import HIDDEN, write_atomically

NAME_BYTES = 120  # bytes of a folder's name: encrypted file systems allow 143, and Windows 260 of the whole path
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)  # to Windows


def check_sortable(images: Sequence[Found], folder: Path) -> None:
    """Raise ZooError for images that are not files, and for a folder among the images, which would be found again."""
    inside, target = [], os.path.abspath(folder) + os.sep  # noqa: PTH100  the links of Path.resolve are slow
    for image in images:
        if "://" in image.path:
            raise ZooError(f"Only files can be sorted into folders, not {image.name}: omit --sort-into.")
        inside += [image.name] if os.path.abspath(image.path).startswith(target) else []  # noqa: PTH100
    if inside:
        raise ZooError(f"--sort-into {folder} is where the images are ({inside[0]}): choose another folder.")


def sort_into(images: Iterable[Found], rows: Iterable[Row], folder: Path, link: bool = False) -> None:
    """Copy each image to `folder/CLASS/NAME`, or make a symbolic link there. If the name is taken, by an image of this
    call or by any other file, it gets a number; nothing is replaced. Images that cannot be read are left out, and those
    that an earlier call has copied are not copied again.

    Raises:
        ZooError: the folder is not writable, or the system allows no links.
    """
    taken: set[str] = set()  # some file systems ignore the case
    first: Counter[str] = Counter()  # numbers of a name that are all taken
    for image, row in zip(images, rows, strict=True):
        if "error" in row:
            continue
        source, place = Path(image.path), folder_name(label(row))
        unnumbered = folder / place / source.name
        key = str(unnumbered).casefold()
        try:
            unnumbered.parent.mkdir(parents=True, exist_ok=True)
            for number in count(first[key] + 1):
                target = unnumbered.with_name(_numbered(source, number))
                done = _is_copy(source, target) or (target.is_symlink() and target.readlink() == source.absolute())
                if str(target).casefold() not in taken and (done or not os.path.lexists(target)):
                    break
            taken.add(str(target).casefold())
            first[key] += number == first[key] + 1
            if not link and not _is_copy(source, target):
                write_atomically(target, partial(shutil.copy2, source))
            elif link and not os.path.lexists(target):
                target.symlink_to(source.absolute())
        except OSError as error:
            advice = "omit --link" if link and os.name == "nt" else "choose another --sort-into"
            raise cannot_write(unnumbered, error, advice) from error


def _is_copy(source: Path, target: Path) -> bool:
    return target.is_file() and not target.is_symlink() and filecmp.cmp(source, target)


def folder_name(classname: str) -> str:
    """A class name as the name of a folder on every system: without what some of them do not allow, and not longer than
    `NAME_BYTES`."""
    name = re.sub(rf'[<>:"/\\|?*\ud800-\udfff]|{HIDDEN.pattern}', "_", classname).strip(" .")
    if len(name.encode()) > NAME_BYTES:
        digest = hashlib.sha256(classname.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        name = f"{name.encode()[:NAME_BYTES].decode(errors='ignore')}-{digest}"
    return f"_{name}" if not name or DEVICE.match(name) else name


def _numbered(file: Path, number: int) -> str:
    """The name of an image with a number, if that is not 1."""
    end = f"-{number}{file.suffix}" if number > 1 else file.suffix
    stem = file.stem
    while len(os.fsencode(stem + end)) > 255:  # on most file systems
        stem = stem[:-1]
    return stem + end
