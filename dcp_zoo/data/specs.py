"""The table of datasets, `datasets.yaml`: their names, layouts, prompts, sizes, terms and archives."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dcp_zoo.errors import ZooError, nearest_hint
from dcp_zoo.fields import Values


@dataclass(frozen=True)
class Archive:
    """One file of a dataset as its source offers it."""

    url: str
    md5: str = ""  # its published checksum; "" if none is known
    places: dict[str, str] = field(default_factory=dict)  # folders in it: where they go; without any, the file itself
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
    counts: tuple[int, int, int] | None = None  # train, val and test images in CoOp's tables
    template: str = "a photo of a {}."  # the zero-shot prompt
    names: str | None = None  # its entry in classnames.json; None if only its folders name the classes
    shifts: tuple[str, ...] = ()  # datasets of the same classes in other styles: the targets for domain shift
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
        """How much of another dataset it is, as a sentence; "" for a whole one."""
        if not (self.part_of and self.counts):
            return ""
        whole = DATASETS[self.part_of]
        assert whole.counts
        return (
            f"{self.name} is a part of {self.part_of}: {self.num_classes} of {whole.num_classes} classes, "
            f"{self.counts[2]:,} of {whole.counts[2]:,} test images. Accuracies on the two cannot be compared."
        )


def _read_table() -> dict[str, DatasetSpec]:
    rows: dict[str, Values] = yaml.safe_load((Path(__file__).parent / "datasets.yaml").read_text("utf-8"))
    for row in rows.values():
        row["archives"] = tuple(Archive(**archive) for archive in row.get("archives", ()))
        row |= {name: tuple(row[name]) for name in ("counts", "shifts") if name in row}
    return {name: DatasetSpec(name=name, **row) for name, row in rows.items()}


DATASETS = _read_table()
VARIANTS = list(DATASETS["imagenet"].shifts)


def list_datasets() -> list[str]:
    """Names of the 11 datasets of the few-shot protocol."""
    return [name for name, spec in DATASETS.items() if spec.counts and not (name in VARIANTS or spec.part_of)]


def find_spec(name: str) -> DatasetSpec:
    """The table's entry for `name`; ZooError with the nearest names if it is unknown."""
    if name in DATASETS:
        return DATASETS[name]
    valid = nearest_hint(name, DATASETS) or f" Choose one of: {', '.join(DATASETS)}."
    raise ZooError(f"Unknown dataset {name!r}.{valid}")


def is_own(name: str) -> bool:
    """Whether a name stands for images of the user's choice."""
    return find_spec(name).num_classes is None
