"""Download datasets into CoOp's layout: archives are continued where they stopped, checked and unpacked; ImageNet's
official ones are arranged."""

import http.client
import lzma
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dcp_zoo.data.load import CheckRow, check
from dcp_zoo.data.progress import bar
from dcp_zoo.data.specs import DATASETS, Archive, DatasetSpec, find_spec
from dcp_zoo.errors import ZooError, as_zoo_error, writing_to

ARCHIVES = ".downloads"  # under the data root: archives while they are needed
SILENCE = 30.0  # seconds without a byte, after which a connection is broken
TRIES = 5  # in a row without a new byte
FIRST_PAUSE = 2.0  # seconds before the second try, doubled for each further one
AGENT = {"User-Agent": "dcp_zoo"}  # some servers refuse Python's own
# what the standard library raises for archives it cannot read, encrypted ones included
DAMAGED = (tarfile.TarError, zipfile.error, zlib.error, lzma.LZMAError, EOFError, KeyError, ValueError, RuntimeError)


def downloadable() -> list[str]:
    """The datasets that `download_dataset` can get, or says how to get."""
    return [name for name, spec in DATASETS.items() if spec.archives or name == "imagenet"]


def missing(names: Sequence[str], root: Path) -> list[DatasetSpec]:
    """The datasets of these names that are not complete under the data root; ZooError for one without a source."""
    specs = [find_spec(row.name) for row in check(root, names=names) if row.status != "ok"]
    for spec in specs:
        if spec.name not in downloadable():
            raise ZooError(f"{spec.name} cannot be downloaded: choose from {', '.join(downloadable())}. {spec.where}")
    return specs


def download_dataset(spec: DatasetSpec, root: Path) -> CheckRow:
    """Fetch and unpack a dataset's archives, check it, and delete them; for ImageNet see `arrange`. ZooError as
    of `fetch_archive` and `unpack`, or if it is not complete then: its archives are kept."""
    assert spec.folder
    if spec.name == "imagenet":
        arrange(root / spec.folder, root / ARCHIVES)
    for archive in spec.archives:
        unpack(archive, fetch_archive(archive, root / ARCHIVES), root / spec.folder)
    row = check(root, names=[spec.name])[0]
    if row.status != "ok":
        raise ZooError(f"{spec.name} was downloaded, but it is not complete: {row.message}")
    for archive in spec.archives:
        (root / ARCHIVES / archive.filename).unlink(missing_ok=True)
    return row


def fetch_archive(archive: Archive, folder: Path) -> Path:
    """The archive in `folder`, downloaded if it is not there yet. What arrived is continued, also by the next call, if
    a published checksum tells whether the whole is right. ZooError if the source does not answer or has another file,
    the connection stays broken, or the disk is full."""
    target = folder / archive.filename
    part = target.with_name(f"{target.name}.part")
    with writing_to(folder, "run the same command again: it continues"):
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            part = target
        else:
            _download(archive, part)
        _check_md5(archive, part)
        return part.rename(target)


def _download(archive: Archive, part: Path) -> None:
    """Get all bytes of `part`; a lost connection is tried again as long as that brings new bytes."""
    most = failures = 0
    while True:
        try:
            return _append(archive, part)
        except urllib.error.HTTPError as error:
            raise _cannot_download(archive, part.parent, f"HTTP {error.code} {error.reason}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            size = part.stat().st_size if part.exists() else 0
            most, failures = max(most, size), 1 if size > most else failures + 1
            if failures == TRIES:
                raise _cannot_download(archive, part.parent, str(getattr(error, "reason", error))) from error
        time.sleep(FIRST_PAUSE * 2 ** (failures - 1))


def _append(archive: Archive, part: Path) -> None:
    """Append what is missing; ConnectionError if some still is."""
    done = part.stat().st_size if archive.md5 and part.exists() else 0
    headers = AGENT | ({"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers), timeout=SILENCE)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:
            return  # nothing is missing
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise _cannot_download(archive, part.parent, "it answers with a web page")
        if answer.status != 206 or not (answer.headers["Content-Range"] or "").startswith(f"bytes {done}-"):
            done = 0
        missing, free = answer.length, shutil.disk_usage(part.parent).free
        if missing is not None and missing > free:
            sizes = f"has {free / 1e9:.1f} GB free, but {missing / 1e9:.1f} GB of {part.stem} are missing"
            raise ZooError(f"{part.parent} {sizes}: free disk space, or use another --data-root.")
        total = None if missing is None else done + missing
        shown = bar(None, archive.filename, total, initial=done, unit="B", unit_scale=True)
        with part.open("ab" if done else "wb") as file, shown:
            while piece := answer.read1(2**20):
                done += file.write(piece)
                shown.update(len(piece))
    if total is not None and done < total:
        raise ConnectionError("the connection ended early")


def _check_md5(archive: Archive, file: Path) -> None:
    """Delete the file and raise ZooError unless it has the published checksum."""
    if not archive.md5:
        return
    from torchvision.datasets.utils import calculate_md5  # slow to import

    if (found := calculate_md5(file)) != archive.md5:
        file.unlink()
        problem = f"has the md5 {found}, but {archive.md5} is published. It was deleted"
        raise ZooError(f"{file.name} {problem}; run the same command again to download it from {archive.url}.")


def _cannot_download(archive: Archive, folder: Path, problem: str) -> ZooError:
    checked = f" (md5 {archive.md5})" if archive.md5 else ""
    advice = f"put {archive.filename}{checked} in {folder} yourself, and run the same command again"
    return ZooError(f"{archive.url} cannot be downloaded: {problem}. If it stays so, {advice}.")


def unpack(archive: Archive, file: Path, folder: Path) -> None:
    """Put the archive's `places` under `folder`, where files appear only when all have been unpacked. ZooError if it is
    damaged or no archive, lacks one of the places, holds links or paths that lead out of it, or the disk is full."""
    damaged = f"{file} cannot be unpacked ({{}}): delete it, and run the same command again to download it once more."
    with writing_to(folder, "run the same command again"), as_zoo_error(damaged, *DAMAGED):
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.places:
            shutil.copy(file, folder / archive.filename)
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
            extract(file, Path(temporary), list(archive.places), archive.inner)
            for place in archive.places:
                if not (Path(temporary) / place).is_dir():
                    raise ZooError(f"{file} has no folder {place}: it is not the archive that {archive.url} offered.")
            for place, destination in archive.places.items():
                source = Path(temporary) / place
                for path in filter(Path.is_file, source.rglob("*")):
                    new = folder / destination / path.relative_to(source)
                    new.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(new)


def extract(file: Path, target: Path, places: Sequence[str], inner: str = "") -> None:
    """Unpack folders of a zip or tar archive, or of the tar `inner` in a zip, without what macOS adds. One of `DAMAGED`
    if it cannot be read; ZooError for a link or device in it."""

    def is_needed(name: str) -> bool:
        inside = any(name.removeprefix("./").startswith(place and f"{place}/") for place in places)
        return inside and not PurePosixPath(name).name.startswith("._")

    def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        if not is_needed(member.name):
            return None
        if not (member.isfile() or member.isdir()):
            raise ZooError(f"{file}: {member.name} is a link or a device, which no dataset needs. Nothing was kept.")
        return tarfile.data_filter(member, path)  # which refuses paths that lead out

    if not zipfile.is_zipfile(file):
        if not tarfile.is_tarfile(file):  # whose own error has a line for each kind of compression
            raise ValueError("neither a zip nor a tar file")
        with tarfile.open(file) as tar:
            tar.extractall(target, filter=checked)
        return
    with zipfile.ZipFile(file) as opened:
        if inner:
            with opened.open(inner) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                tar.extractall(target, filter=checked)
        else:  # its paths stay inside: the standard library drops what would lead out
            opened.extractall(target, filter(is_needed, opened.namelist()))


TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")


def arrange(folder: Path, archives: Path) -> None:
    """Unpack ImageNet's official archives into `folder`/images/train and val, one folder per WordNet id, by
    torchvision, which checks their checksums first. ZooError if they are not there, or others."""
    site = "https://image-net.org/download.php"
    if absent := [name for name in TARS if not (archives / name).is_file()]:
        raise ZooError(f"ImageNet needs a login: get {', '.join(absent)} from {site}, and put them into {archives}.")
    from torchvision.datasets import imagenet

    train, val, devkit = (str((archives / name).absolute()) for name in TARS)
    with writing_to(folder, "run the same command again"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
            # the message of torchvision names the archive
            with as_zoo_error("{} Its checksum is not the published one.", RuntimeError):
                imagenet.parse_devkit_archive(temporary, devkit)
                imagenet.parse_val_archive(temporary, val)
                imagenet.parse_train_archive(temporary, train)
            for part in ("train", "val"):
                shutil.rmtree(folder / "images" / part, ignore_errors=True)
                (Path(temporary) / part).rename(folder / "images" / part)
