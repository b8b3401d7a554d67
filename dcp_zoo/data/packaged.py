"""What this package has of datasets: the table `datasets.yaml` (names, layouts, prompts, sizes, terms,
archives), class names, CoOp's splits, parts of two, and few-shot draws (MIT, see `coop/LICENSE`); and
photographs. For four datasets it has, in place of the split, the draw of one image per class with seed
1: a split with this draw is CoOp's."""

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from PIL import Image

from dcp_zoo.data.images import load_image
from dcp_zoo.errors import ZooError, nearest_hint
from dcp_zoo.fields import Values

HERE = Path(__file__).parent
SplitRows = Mapping[str, Sequence[tuple[str, int, str]]]  # by part: path, label and class name of each image


@dataclass(frozen=True)
class Archive:
    """One file of a dataset as its source offers it."""

    url: str
    md5: str = ""  # its published checksum; "" if none is known
    folders: dict[str, str] = field(default_factory=dict)  # folders in it: where they go; without any, the file itself
    inner: str = ""  # an archive inside the archive that holds these folders
    name: str = ""  # the file's name, if it is not the last part of the url

    @property
    def filename(self) -> str:
        return self.name or self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset: where its files are, how they are laid out, and its metadata."""

    name: str
    folder: str | None  # under the data root; "" is the root itself, None needs no files
    images: str = ""  # the image folder under `folder`
    split_file: str | None = None  # under `folder`; None where the folders are the split
    num_classes: int | None = None  # None: as many as there are folders
    counts: list[int] | None = None  # train, val and test images in CoOp's tables
    template: str = "a photo of a {}."  # the zero-shot prompt
    names: str | None = None  # its entry in classnames.json; None if only its folders name the classes
    shifts: Sequence[str] = ()  # datasets of the same classes in other styles: the targets for domain shift
    part_of: str | None = None  # the dataset of which this one has only some classes or images
    source: str  # the page about the images
    terms: str = ""  # their licence, or what their page says about using them
    archives: tuple[Archive, ...] = ()  # what to download; () if nothing can be, or it needs a login
    layout: str = "listed"  # the reader of its files, see `dcp_zoo.data.load`

    @property
    def where(self) -> str:
        """Where to get the dataset, as a sentence."""
        if not self.folder:
            return f"Needed: {self.source}"
        command = f", or by `dcp-zoo data download {self.name}`" if self.archives else ""
        return f"Get it from {self.source}{command}"

    @property
    def part_note(self) -> str:
        """Of which other dataset it is a part, as a sentence; "" for a whole one."""
        if not self.part_of:
            return ""
        return f"{self.name} is a part of {self.part_of}: accuracies on the two cannot be compared."


def _read_table() -> dict[str, DatasetSpec]:
    rows: dict[str, Values] = yaml.safe_load((HERE / "datasets.yaml").read_text("utf-8"))
    for row in rows.values():
        row["archives"] = tuple(Archive(**archive) for archive in row.get("archives", ()))
    return {name: DatasetSpec(name=name, **row) for name, row in rows.items()}


DATASETS = _read_table()


def list_datasets() -> list[str]:
    """Names of the 11 datasets of the few-shot protocol."""
    others = DATASETS["imagenet"].shifts  # ImageNet's classes in other styles
    return [name for name, spec in DATASETS.items() if spec.counts and not spec.part_of and name not in others]


def find_spec(name: str) -> DatasetSpec:
    """The table's entry for `name`; ZooError with the nearest names if it is unknown."""
    if name in DATASETS:
        return DATASETS[name]
    valid = nearest_hint(name, DATASETS) or f" Choose one of: {', '.join(DATASETS)}."
    raise ZooError(f"Unknown dataset {name!r}.{valid}")


def is_user_data(name: str) -> bool:
    """Whether a name stands for images of the user's choice."""
    return find_spec(name).num_classes is None


def classnames(name: str) -> list[str]:
    """Class names of a dataset in label order, in CoOp's spelling: underscores stand for spaces."""
    spec = find_spec(name)
    if spec.names is None:
        raise ZooError(f"The folders of {name} define its classes: use load_split({name!r}, root).classnames.")
    return list(_class_names()[spec.names])


@cache
def split_rows(name: str) -> SplitRows | None:
    """The rows of CoOp's split file, or a part's own; None if the package does not have them."""
    path = HERE / "coop" / f"{name}.json.xz"
    return json.loads(lzma.decompress(path.read_bytes())) if path.is_file() else None


@cache
def drawn(name: str) -> list[str] | None:
    """The training images drawn with one per class and seed 1; None if the package does not have them."""
    draws = lzma.decompress((HERE / "coop" / "drawn.json.xz").read_bytes())
    return json.loads(draws).get(name)


def wnid_names() -> dict[str, str]:
    """The names of ImageNet's classes by WordNet id, in label order."""
    wnids = [key.split("/")[1] for key in drawn("imagenet") or []]
    return dict(zip(wnids, classnames("imagenet"), strict=True))


@cache
def _class_names() -> dict[str, list[str]]:
    return json.loads((HERE / "classnames.json").read_text("utf-8"))


# What the photographs show, then names of other things, as six right ones would be too easy.
SAMPLE_CLASSES = [
    "cat", "cup of coffee", "otter", "bird of prey", "lake in the mountains", "blue flowers",
    "dog", "bowl of soup", "seal", "owl", "beach", "butterfly",
]  # fmt: skip


def sample_images() -> list[str]:
    """The paths of six photographs, in the order of the first six of `SAMPLE_CLASSES`."""
    return [str(HERE / "photos" / f"{name}.jpg") for name in ("cat", "coffee", "otter", "osprey", "lake", "flowers")]


def everyday_file(model: str) -> Path:
    """Where a plain model's features of these pictures are, if the package has them, see
    `hub/bundle_heads.py`."""
    return HERE / "photos" / f"{model}.safetensors"


def everyday_pictures() -> list[Image.Image]:
    """Thirty pictures that few classifiers are about: the photographs of `sample_images` and their
    quarters."""
    pictures = []
    for photo in map(load_image, sample_images()):
        middle = photo.width // 2
        centre = photo.height // 2
        pictures.append(photo)
        for top, bottom in ((0, centre), (centre, photo.height)):
            for left, right in ((0, middle), (middle, photo.width)):
                pictures.append(photo.crop((left, top, right, bottom)))
    return pictures
