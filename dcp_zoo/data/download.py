"""Download datasets into CoOp's layout; arrange ImageNet from its official archives or its gated Hub dataset."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dcp_zoo.data import packaged
from dcp_zoo.data.archives import fetch_archive, unpack
from dcp_zoo.data.load import CheckRow, check
from dcp_zoo.data.specs import DATASETS, DatasetSpec, find_spec
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra, writing_to

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
FROM_HUB = "hf"  # in place of the folder with the archives
REPO = "ILSVRC/imagenet-1k"
HUB_PARTS = {"train": "train", "validation": "val"}  # by the names of the Hub's files
AGAIN = "run the same command again"


def arrange(folder: Path, source: str | Path | None) -> None:
    """Put ImageNet's images into `folder`/images/train and val, one folder per WordNet id, from the folder with the
    three archives, or "hf". ZooError if that is not possible."""
    if source is None:
        site, hub = "https://image-net.org/download.php", f"https://huggingface.co/datasets/{REPO}"
        raise ZooError(
            f"ImageNet needs a login: get {', '.join(TARS)} from {site}, and pass --imagenet-from FOLDER with them. "
            f"Or request access at {hub}, log in with `hf auth login`, and pass --imagenet-from {FROM_HUB}."
        )
    with writing_to(folder, AGAIN):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        if str(source) == FROM_HUB:
            from_hub(folder)
        else:
            from_archives(folder, Path(source))


def from_archives(folder: Path, archives: Path) -> None:
    """Unpack the official archives by torchvision, which checks their checksums first."""
    absent = [name for name in TARS if not (archives / name).is_file()]
    if absent:
        raise ZooError(f"{archives} has no {', '.join(absent)}: all of {', '.join(TARS)} are needed.")
    from torchvision.datasets import imagenet

    train, val, devkit = (str((archives / name).absolute()) for name in TARS)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
        with as_zoo_error("{} Its checksum is not the published one.", RuntimeError):  # its message names the archive
            imagenet.parse_devkit_archive(temporary, devkit)
            imagenet.parse_val_archive(temporary, val)
            imagenet.parse_train_archive(temporary, train)
        _replace_parts(Path(temporary), folder)


def from_hub(folder: Path) -> None:
    """Write the images of the Hub's Parquet files, one file after the other: a run that was stopped continues there."""
    parquet = import_extra("pyarrow.parquet", "data")
    from huggingface_hub import HfApi, hf_hub_download

    from dcp_zoo.hub import explained, retried

    wnids, work = list(packaged.wnid_names()), folder / ".from-hub"
    with explained(f"datasets/{REPO}"):
        info = retried(lambda: HfApi().dataset_info(REPO))
        fetch = partial(hf_hub_download, REPO, repo_type="dataset", revision=info.sha, local_dir=work)
        for name in sorted(file.rfilename for file in info.siblings or []):
            part = HUB_PARTS.get(Path(name).name.partition("-")[0])
            done = work / f"{Path(name).name}.done"
            if part is None or not name.endswith(".parquet") or done.exists():
                continue
            file = retried(partial(fetch, name))
            with parquet.ParquetFile(file) as table:
                for rows in table.iter_batches(256, columns=["image", "label"]):
                    for row in rows.to_pylist():  # the Hub's file names have the WordNet id appended
                        image = Path(re.sub(r"_n\d{8}(?=\.JPEG$)", "", row["image"]["path"])).name
                        (place := work / part / wnids[row["label"]] / image).parent.mkdir(parents=True, exist_ok=True)
                        place.write_bytes(row["image"]["bytes"])
            done.touch()
            Path(file).unlink()
    _replace_parts(work, folder)
    shutil.rmtree(work)


def _replace_parts(source: Path, folder: Path) -> None:
    """Replace the two parts in `folder`/images by those in `source`."""
    for part in HUB_PARTS.values():
        if not (source / part).is_dir():
            raise ZooError(f"The source has no images of the part {part}: it is not ImageNet. {AGAIN.capitalize()}.")
        shutil.rmtree(folder / "images" / part, ignore_errors=True)
        (source / part).rename(folder / "images" / part)
