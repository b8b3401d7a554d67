"""Datasets of the Hugging Face Hub, through the `datasets` library."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from dcp_zoo.data.specs import HUB_SCHEME, HUB_SYNTAX, DatasetSpec
from dcp_zoo.data.splits import PART_NAMES, Item, Split
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra
from dcp_zoo.fields import Values

_NAME = re.compile(
    r"hf://datasets/(?P<repo>[^/@:?#]+/[^/@:?#]+)(@(?P<revision>[^:?#]+))?(:(?P<config>[^?#]+))?(\?(?P<columns>[^#]+))?"
)
NOT_LOADED = "`datasets` cannot load {} ({{}}). Its cache is in HF_HOME, which must be writable."
TEXT_LABELS = ("label", "labels")  # text columns with these names are used as classes by default


class HubDataset(NamedTuple):
    """A dataset on the Hub; columns that are None are found by their types."""

    repo: str
    revision: str | None
    config: str | None
    image: str | None = None
    label: str | None = None

    @classmethod
    def parse(cls, name: str) -> "HubDataset":
        """Parse a name; ZooError shows the syntax if it is invalid."""
        found = _NAME.fullmatch(name)
        columns = dict(parse_qsl(found["columns"] or "")) if found else {}
        if found is None or not columns.keys() <= {"image", "label"}:
            raise ZooError(f"{name!r} is not the name of a Hub dataset: use {HUB_SYNTAX}.")
        return cls(found["repo"], found["revision"], found["config"], **columns)

    def __str__(self) -> str:
        columns = "&".join(f"{k}={v}" for k, v in (("image", self.image), ("label", self.label)) if v)
        parts = [("@", self.revision), (":", self.config), ("?", columns)]
        return f"{HUB_SCHEME}datasets/{self.repo}" + "".join(sign + text for sign, text in parts if text)


def read_hub(spec: DatasetSpec, _: Path) -> Split:
    """The complete dataset, downloaded if missing. Its name and its items' keys contain the commit, as hashes must."""
    source, builder = _pinned(spec.name)
    if builder.info.features:  # check before anything large is downloaded
        _with_columns(source, builder.info.features)
    data = _splits(source.repo, source.config, source.revision)
    features = next(iter(data.values())).features
    source = _with_columns(source, features)
    values = {split: list(rows[source.label]) for split, rows in data.items()}
    classes = getattr(features[source.label], "names", None) or sorted({v for vs in values.values() for v in vs if v})
    parts, left_out = _parts(source, classes, values)
    note = f"Images from column {source.image}, classes from {source.label}."
    if left_out:
        note += f" Left out: {', '.join(left_out)}."
    return Split(str(source), list(classes), **parts, note=note, place=str(source))


def read_row(path: str) -> bytes:
    """The image file for an item's path, `<source>#<split>/<row>`."""
    name, _, place = path.partition("#")
    split, _, row = place.rpartition("/")
    return _image_file(_split_images(name, split)[int(row)])


@cache
def _split_images(name: str, split: str) -> Any:
    """Rows of {"bytes": ..., "path": ...} of one split."""
    source = HubDataset.parse(name)
    rows = _splits(source.repo, source.config, source.revision)[split].select_columns([source.image])
    return rows.cast_column(source.image, import_extra("datasets", "data").Image(decode=False))[source.image]


def _parts(source: HubDataset, classes: list[str], values: dict[str, list]) -> tuple[Values, list[str]]:
    """Items of train, val and test from each split's labels or class names; and the splits that are left out."""
    numbers = {name: number for number, name in enumerate(classes)}
    parts: dict[str, list[Item]] = {}
    left_out = []
    for split, column in values.items():
        part = PART_NAMES.get(split, "train" if len(values) == 1 else "")
        labels = [numbers.get(value, value) for value in column]
        if not part or part in parts or set(labels) == {-1}:  # the Hub marks withheld labels with -1
            left_out.append(split)
            continue
        for index, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < len(classes):
                raise ZooError(f"{source}: row {index} of {split} has the label {label!r}, which is not a class.")
        place = f"{source.revision}/{split}"
        parts[part] = [Item(f"{source}#{split}/{i}", f"{place}/{i}", label) for i, label in enumerate(labels)]
    if not parts:
        needed = f"Needed: labels, and a name among {', '.join(PART_NAMES)}."
        raise ZooError(f"{source}: none of its splits {', '.join(values)} is usable. {needed}")
    return parts, left_out


def _with_columns(source: HubDataset, features: Values) -> HubDataset:
    """The dataset with the columns of its images and its classes: those that it names, otherwise the only ones of their
    types. A text column must be named, unless it is one of `TEXT_LABELS`."""
    types = {name: type(feature).__name__ for name, feature in features.items()}
    kinds = {name: getattr(feature, "dtype", types[name]) for name, feature in features.items()}
    images = [name for name, kind in types.items() if kind == "Image" and source.image in (None, name)]
    image = _only(images, source, "image column. Expected: one of type Image", kinds)
    labels = [name for name, kind in types.items() if kind == "ClassLabel"]
    text = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    labels = labels or [name for name in text if name in TEXT_LABELS]
    if source.label:
        labels = [name for name in kinds if name == source.label and (types[name] == "ClassLabel" or name in text)]
    expected = "label column. Expected: one of type ClassLabel, or of text called label"
    return source._replace(image=image, label=_only(labels, source, expected, kinds))


def _pinned(name: str) -> tuple[HubDataset, Any]:
    """The dataset at its commit, and its builder; `datasets` alone would use its cache silently if the Hub refuses."""
    from huggingface_hub import HfApi, constants

    from dcp_zoo.hub import explained

    source = HubDataset.parse(name)
    import_extra("datasets", "data")  # before any request to the Hub
    revision = source.revision
    if not constants.HF_HUB_OFFLINE:
        revision = revision or constants.DEFAULT_REVISION  # some mirrors require one
        with explained(f"datasets/{source.repo}", revision=revision):
            revision = HfApi().dataset_info(source.repo, revision=revision).sha
    builder = _builder(source.repo, source.config, revision)
    return source._replace(revision=builder.hash), builder


@cache
def _builder(repo: str, config: str | None, revision: str | None) -> Any:
    """The dataset's builder, which knows its metadata before the download."""
    with as_zoo_error(NOT_LOADED.format(repo), Exception):  # readers of a dozen file formats raise almost any
        builder = import_extra("datasets", "data").load_dataset_builder(repo, config, revision=revision)
    if revision not in (None, builder.hash):
        raise ZooError(f"{repo}: offline, only the commit @{builder.hash} is in the cache of `datasets`: use it.")
    return builder


@cache
def _splits(repo: str, config: str | None, revision: str | None) -> Values:
    """The dataset's splits by name, downloaded if they are not in the cache."""
    builder = _builder(repo, config, revision)
    with as_zoo_error(NOT_LOADED.format(repo), Exception):
        builder.download_and_prepare()
        return builder.as_dataset()


def _image_file(cell: Values) -> bytes:
    """The bytes in a cell {"bytes": ..., "path": ...}, or those of the file that it names."""
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if not cell.get("path"):
        raise ValueError("the cell is empty")
    return Path(cell["path"]).read_bytes()


def _only(candidates: Sequence[str], source: HubDataset, what: str, kinds: Mapping[str, object]) -> str:
    """The one column that can be what is needed; ZooError for none or several among all columns and their `kinds`."""
    if len(candidates) != 1:
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ZooError(f"{source}: cannot determine the {what}; found: {found}. Name it: {HUB_SYNTAX}.")
    return candidates[0]
