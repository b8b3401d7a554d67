"""Datasets of the Hugging Face Hub, through the `datasets` library: hf://datasets/ORG/NAME[@REVISION][:CONFIG]."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from dcp_zoo.data.splits import PART_NAMES, Item, LabelledImages
from dcp_zoo.data.table import HUB_SCHEME, HUB_SYNTAX, DatasetSpec
from dcp_zoo.errors import NOT_WRITABLE, ZooError, import_extra

_NAME = re.compile(
    r"hf://datasets/(?P<repo>[^/@:?#]+/[^/@:?#]+)(@(?P<revision>[^:?#]+))?(:(?P<config>[^?#]+))?(\?(?P<columns>[^#]+))?"
)
COLUMNS = {"image": "of type Image", "label": "of type ClassLabel, or of text called label"}
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


def read_hub(spec: DatasetSpec, _: Path) -> LabelledImages:
    """The complete dataset, downloaded into the cache of `datasets` if missing.

    The dataset's name and its items' keys contain the commit, so that different contents have different hashes.
    """
    source, builder = _pinned(spec.name)
    if builder.info.features:
        _columns(source, builder.info.features)  # check before anything large is downloaded
    data = _download(source.repo, source.config, source.revision)
    features = next(iter(data.values())).features
    image, label = _columns(source, features)
    source = source._replace(revision=builder.hash, image=image, label=label)
    values = {split: list(rows[label]) for split, rows in data.items()}
    classes = getattr(features[label], "names", None) or sorted({v for vs in values.values() for v in vs if v})
    parts, left_out = _parts(source, classes, values)
    note = f"Images from column {image}, classes from {label}."
    if left_out:
        note += f" Left out: {', '.join(left_out)}."
    return LabelledImages(str(source), list(classes), parts, str(source), note)


def hub_images(name: str) -> list[str]:
    """The paths for `load_image` of all images of all splits, which need no labels; downloaded like `read_hub`."""
    source, builder = _pinned(name)
    data = _download(source.repo, source.config, source.revision)
    image = _column("image", source, next(iter(data.values())).features)
    source = source._replace(revision=builder.hash, image=image)
    return [f"{source}#{split}/{i}" for split, rows in data.items() for i in range(len(rows))]


def _pinned(name: str) -> tuple[HubDataset, Any]:
    """The dataset at the commit of its revision, and its builder."""
    source = HubDataset.parse(name)
    import_extra("datasets", "data")  # before any request to the Hub
    source = source._replace(revision=_commit(source))
    return source, _builder(source.repo, source.config, source.revision)


def _parts(
    source: HubDataset, classes: list[str], values: dict[str, list[Any]]
) -> tuple[dict[str, list[Item]], list[str]]:
    """Items of train, val and test, and the splits that are none of these or have no labels. `values`: each split's
    label column, as numbers or class names."""
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
        raise ZooError(
            f"{source}: none of its splits {', '.join(values)} is usable. Needed: labels, and a name among "
            f"{', '.join(PART_NAMES)}."
        )
    return parts, left_out


def read_row(path: str) -> bytes:
    """The image file for an item's path, `<source>#<split>/<row>`."""
    name, _, place = path.partition("#")
    split, _, row = place.rpartition("/")
    image = _images(name, split)[int(row)]
    return image["bytes"] or Path(image["path"]).read_bytes()


@cache
def _images(name: str, split: str) -> Any:
    """Rows of {"bytes": ..., "path": ...} of one split."""
    source = HubDataset.parse(name)
    rows = _download(source.repo, source.config, source.revision)[split].select_columns([source.image])
    return rows.cast_column(source.image, import_extra("datasets", "data").Image(decode=False))[source.image]


# --- requests to the Hub and `datasets` ------------------------------------------------------------------------------


def _commit(source: HubDataset) -> str | None:
    """The commit of the revision on the Hub; offline the revision itself, to be looked up in the cache.

    `datasets` queries the Hub too, but silently falls back to its cache if the Hub refuses.
    """
    from huggingface_hub import HfApi, constants

    from dcp_zoo.hub_errors import explained

    if constants.HF_HUB_OFFLINE:
        return source.revision
    revision = source.revision or constants.DEFAULT_REVISION  # some mirrors require one
    with explained(f"datasets/{source.repo}", revision=revision):
        return HfApi().dataset_info(source.repo, revision=revision).sha


@cache
def _builder(repo: str, config: str | None, revision: str | None) -> Any:
    """The dataset's builder, which knows its metadata before the download."""
    library = import_extra("datasets", "data")
    with _explained(repo):
        builder = library.load_dataset_builder(repo, config, revision=revision)
    if revision not in (None, builder.hash):
        raise ZooError(
            f"{repo}: offline, only the commit {builder.hash} is in the cache of `datasets`: use @{builder.hash}."
        )
    return builder


@cache
def _download(repo: str, config: str | None, revision: str | None) -> dict[str, Any]:
    """The dataset's splits by name."""
    builder = _builder(repo, config, revision)
    with _explained(repo):
        builder.download_and_prepare()
        return builder.as_dataset()


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # readers of a dozen file formats raise almost any exception
        advice = ". Set HF_HOME to a writable folder." if getattr(error, "errno", None) in NOT_WRITABLE else ""
        raise ZooError(f"`datasets` cannot load {repo}: {error}{advice}") from error


# --- columns ---------------------------------------------------------------------------------------------------------


def _columns(source: HubDataset, features: dict[str, Any]) -> tuple[str, str]:
    """The columns of the images and of the classes."""
    return _column("image", source, features), _column("label", source, features)


def _column(what: str, source: HubDataset, features: dict[str, Any]) -> str:
    """The column of the images or of the classes: the one named by `source`, otherwise the only one of its type.

    Classes are a ClassLabel or text; a text column must be named explicitly, unless it is one of `TEXT_LABELS`.
    """
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    if what == "image":
        requested = source.image
        possible = likely = [name for name, kind in kinds.items() if kind == "Image"]
    else:
        requested = source.label
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        strings = ("string", "large_string")
        text = [name for name, feature in features.items() if getattr(feature, "dtype", None) in strings]
        possible, likely = [*labels, *text], labels or [name for name in text if name in TEXT_LABELS]
    candidates = [requested] if requested else likely
    if len(candidates) != 1 or candidates[0] not in possible:
        found = ", ".join(f"{name} ({getattr(features[name], 'dtype', kind)})" for name, kind in kinds.items())
        raise ZooError(
            f"{source}: cannot determine the {what} column. Expected: one {COLUMNS[what]}; found: {found}. "
            f"Name it: {HUB_SYNTAX}."
        )
    return candidates[0]
