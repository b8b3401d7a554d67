"""Download datasets into CoOp's layout: archives are continued where they stopped, checked and unpacked."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dcp_zoo.data.load import CheckRow, check
from dcp_zoo.data.packaged import DATASETS, Archive, DatasetSpec, find_spec
from dcp_zoo.errors import ZooError, as_zoo_error, writing_to

ARCHIVES = ".downloads"  # under the data root: archives while they are needed
AGENT = {"User-Agent": "dcp_zoo"}  # some servers refuse Python's own
NOTHING_FOLLOWS = 416  # what a server answers that is asked for what follows the last byte


def downloadable() -> list[str]:
    return [name for name, spec in DATASETS.items() if spec.archives]


def missing(names: Sequence[str], root: Path) -> list[DatasetSpec]:
    """The datasets of these names that are not complete under the data root; ZooError for one without a
    source."""
    specs = [find_spec(row.name) for row in check(root, names=names) if row.status != "ok"]
    for spec in specs:
        if not spec.archives:
            raise ZooError(f"{spec.name} cannot be downloaded: choose from {', '.join(downloadable())}. {spec.where}")
    return specs


def download_dataset(spec: DatasetSpec, root: Path) -> CheckRow:
    """Fetch and unpack a dataset's archives, check it, and delete them. ZooError as of `fetch_archive`
    and `unpack`, or if it is not complete then: archives with a checksum are kept."""
    assert spec.folder
    for archive in spec.archives:
        unpack(archive, fetch_archive(archive, root / ARCHIVES), root / spec.folder)
    row = check(root, names=[spec.name])[0]
    for archive in spec.archives:
        if row.status == "ok" or not archive.md5:  # without a checksum it may be something else, such as a web page
            (root / ARCHIVES / archive.filename).unlink(missing_ok=True)
    if row.status != "ok":
        raise ZooError(f"{spec.name} was downloaded, but it is not complete: {row.message}")
    return row


def fetch_archive(archive: Archive, folder: Path) -> Path:
    """The archive in `folder`, downloaded if it is not there yet, by the Hub's client, which tries
    again. What arrived is continued, also by the next call, if a published checksum tells whether the
    whole is right. ZooError if the source does not answer or has another file, or the disk is full."""
    from huggingface_hub.errors import HfHubHTTPError  # slow to import, as the next ones
    from huggingface_hub.file_download import http_get
    from torchvision.datasets.utils import check_md5

    target = folder / archive.filename
    part = target.with_name(f"{target.name}.part")
    advice = f"If it stays so, put {target.name} in {folder} yourself, and run the same command again."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            with part.open("ab" if archive.md5 else "wb") as file:
                start = file.tell()
                try:
                    http_get(archive.url, file, resume_size=start, headers=AGENT, displayed_filename=target.name)
                except HfHubHTTPError as error:
                    # nothing follows a part that was whole when its process died: its checksum decides
                    if not (start and error.response.status_code == NOTHING_FOLLOWS):
                        raise
            part.rename(target)
        if archive.md5 and not check_md5(str(target), archive.md5):
            target.unlink()
            raise ValueError(f"the file has not the published md5 {archive.md5}, and was deleted")
    except Exception as error:  # of many kinds, some with pages of advice
        reason = str(error).partition("\n")[0]
        raise ZooError(f"{archive.url} cannot be downloaded: {reason}. {advice}") from error
    return target


def unpack(archive: Archive, file: Path, folder: Path) -> None:
    """Put the archive's `folders` under `folder`, where files appear only when all have been unpacked.
    ZooError as of `extract`, or if it lacks one of them, or for a folder that cannot be written."""
    with writing_to(folder, "run the same command again"):
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.folders:
            shutil.copy(file, folder / archive.filename)
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as name:
            temporary = Path(name)
            advice = f"delete {file}, and run the same command again to download it once more."
            extract(file, temporary, advice)
            if archive.inner:
                extract(temporary / archive.inner, temporary, advice)
            for inside, target in archive.folders.items():
                shutil.copytree(temporary / inside, folder / target, copy_function=os.replace, dirs_exist_ok=True)


def extract(file: Path, folder: Path, advice: str) -> None:
    """Unpack a zip or tar archive, of which nothing leads out of the folder. ZooError, with advice, if
    it is damaged, encrypted, neither of the two, or has links or paths that lead out, or if the disk is
    full."""
    # the standard library raises almost any exception for archives that it cannot read
    with as_zoo_error(f"{file} cannot be unpacked ({{}}): {advice}", Exception):
        if zipfile.is_zipfile(file):
            shutil.unpack_archive(file, folder, "zip")
        else:
            shutil.unpack_archive(file, folder, "tar", filter="data")
