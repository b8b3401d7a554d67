"""The data files of this package: class names, CoOp's splits, parts of two, and few-shot draws (MIT, see
`coop/LICENSE`), photographs. Of four datasets it has no split, but the draw of one per class and seed 1, which tells
whether a split is CoOp's."""

import json
import lzma
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from dcp_zoo.data.images import load_image
from dcp_zoo.data.specs import find_spec
from dcp_zoo.data.splits import PARTS, Item, Split, few_shot
from dcp_zoo.errors import ZooError

HERE = Path(__file__).parent
SplitRows = Mapping[str, Sequence[tuple[str, int, str]]]  # by part: path, label and class name of each image


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


def listed_split(name: str, rows: SplitRows, folder: str = "") -> Split:
    """The split that these rows list; their images are in a folder."""
    names = dict(sorted({label: classname for part in PARTS for _, label, classname in rows[part]}.items()))
    train, val, test = ([Item(f"{folder}/{key}", key, label) for key, label, _ in rows[part]] for part in PARTS)
    return Split(name, list(names.values()), train, val, test, place=folder)


def split_sha256(name: str) -> str | None:
    """`Split.sha256` of these rows; None if the package does not have them."""
    rows = split_rows(name)
    return listed_split(name, rows).sha256 if rows else None


@cache
def drawn(name: str) -> list[str] | None:
    """The training images drawn with one per class and seed 1; None if the package does not have them."""
    return json.loads(lzma.decompress((HERE / "coop" / "drawn.json.xz").read_bytes())).get(name)


def wnid_names() -> dict[str, str]:
    """The names of ImageNet's classes by WordNet id, in label order."""
    wnids = [key.split("/")[1] for key in drawn("imagenet") or []]
    return dict(zip(wnids, classnames("imagenet"), strict=True))


def note_on(images: Split, file: object) -> str:
    """A sentence for the user if the split that was read from `file` is not CoOp's, else ""."""
    rows, keys = split_rows(images.name), drawn(images.name)
    if rows is not None:
        given = [[key, label] for part in PARTS for key, label, _ in rows[part]]
        is_coops = given == [[item.key, item.label] for item in images.items]
    else:
        is_coops = keys in (None, [item.key for item in few_shot(images, 1, 1).train])
    if is_coops:
        return ""
    return f"{file} is not CoOp's split of {images.name}: results on it cannot be compared with published ones."


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


def everyday_pictures() -> list[Image.Image]:
    """Thirty pictures that few classifiers are about: the photographs of `sample_images` and their quarters."""
    pictures = []
    for photo in map(load_image, sample_images()):
        (width, height), x, y = photo.size, photo.width // 2, photo.height // 2
        quarters = (0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)
        pictures += [photo, *(photo.crop(box) for box in quarters)]
    return pictures
