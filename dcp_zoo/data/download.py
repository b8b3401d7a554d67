"""Download datasets into CoOp's layout; arrange ImageNet from its official archives."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dcp_zoo.data.archives import fetch_archive, unpack
from dcp_zoo.data.load import CheckRow, check
from dcp_zoo.data.specs import DATASETS, DatasetSpec, find_spec
from dcp_zoo.errors import ZooError, as_zoo_error, writing_to

ARCHIVES = ".downloads"  # under the data root: archives while they are needed


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


def download_dataset(spec: DatasetSpec, root: Path, imagenet_from: str | Path | None = None) -> CheckRow:
    """Fetch and unpack a dataset's archives, check it, and delete them; for `imagenet_from` see `arrange`. ZooError as
    of `fetch_archive` and `unpack`, or if it is not complete then: its archives are kept."""
    assert spec.folder
    if spec.name == "imagenet":
        arrange(root / spec.folder, imagenet_from)
    for archive in spec.archives:
        unpack(archive, fetch_archive(archive, root / ARCHIVES), root / spec.folder)
    row = check(root, names=[spec.name])[0]
    if row.status != "ok":
        raise ZooError(f"{spec.name} was downloaded, but it is not complete: {row.message}")
    for archive in spec.archives:
        (root / ARCHIVES / archive.filename).unlink(missing_ok=True)
    return row


TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")


def arrange(folder: Path, archives: str | Path | None) -> None:
    """Unpack ImageNet's official archives into `folder`/images/train and val, one folder per WordNet id, by
    torchvision, which checks their checksums first. ZooError if they are not there, or others."""
    site = "https://image-net.org/download.php"
    if archives is None:
        raise ZooError(f"ImageNet needs a login: get {', '.join(TARS)} from {site}, and pass --imagenet-from FOLDER.")
    absent = [name for name in TARS if not (Path(archives) / name).is_file()]
    if absent:
        raise ZooError(f"{archives} has no {', '.join(absent)}: all of {', '.join(TARS)} are needed.")
    from torchvision.datasets import imagenet

    train, val, devkit = (str((Path(archives) / name).absolute()) for name in TARS)
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
