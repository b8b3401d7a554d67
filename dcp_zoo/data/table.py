"""The table of datasets: the single source of their names, layouts, prompts, sizes, terms and archives. It imports no
reader.

URLs and checksums are those in torchvision's source (0.28; Stanford Cars': 0.15), of CoOp's DATASETS.md for its own
files, and of the pages named as `source`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from dcp_zoo.errors import ZooError, nearest

HUB_SCHEME = "hf://"
HUB_SYNTAX = "hf://datasets/ORG/NAME[@REVISION][:CONFIG][?image=COLUMN&label=COLUMN]"
SHARD_SCHEME = "wds://"

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
STANFORD = "https://ai.stanford.edu/~jkrause/car196"
BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks"
HF = "https://huggingface.co/datasets"
DRIVE = "https://drive.google.com/uc?export=download&id="  # CoOp's own files
RESEARCH = "non-commercial research"
UNSTATED = "no licence is known to this package: read its page"


@dataclass(frozen=True)
class Archive:
    """One file of a dataset as its source offers it.

    Attributes:
        url: where it is.
        md5: its published checksum; "" if none is known.
        places: folders in the archive and where they go under the dataset's folder ("" is the folder itself). Without
            any, the file itself goes there.
        inner: an archive inside the archive that holds these folders.
        name: the file's name, if it is not the last part of the url.
    """

    url: str
    md5: str = ""
    places: dict[str, str] = field(default_factory=dict)
    inner: str = ""
    name: str = ""

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


def _pacs(domain: str, **parts: Any) -> DatasetSpec:
    """One of the four styles of PACS: seven classes, one folder each, without a split."""
    return DatasetSpec(
        name=f"pacs_{domain}",
        folder="pacs",
        images=domain,
        num_classes=7,
        names="pacs",
        source="https://domaingeneralization.github.io (one folder per style, in it one per class)",
        **parts,
    )


_SPECS = [
    DatasetSpec(
        name="imagenet",
        folder="imagenet",
        images="images",
        num_classes=1000,
        counts=(1_281_167, 0, 50_000),
        names="imagenet",
        shifts=("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
        source="https://image-net.org/download.php",
        terms=f"{RESEARCH} and education, by ImageNet's terms of access, which you accept when you register",
        layout="imagenet",
    ),
    DatasetSpec(
        name="caltech101",
        folder="caltech-101",
        images="101_ObjectCategories",
        split_file="split_zhou_Caltech101.json",
        num_classes=100,
        counts=(4_128, 1_649, 2_465),
        names="caltech101",
        source="https://data.caltech.edu/records/mzrjq-6wc02",
        terms="CC BY 4.0",
        archives=(
            Archive(
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                "3138e1922a9193bfa496528edbbc45d0",
                {"101_ObjectCategories": "101_ObjectCategories"},
                inner="caltech-101/101_ObjectCategories.tar.gz",
            ),
        ),
    ),
    DatasetSpec(
        name="oxford_pets",
        folder="oxford_pets",
        images="images",
        split_file="split_zhou_OxfordPets.json",
        num_classes=37,
        counts=(2_944, 736, 3_669),
        template="a photo of a {}, a type of pet.",
        names="oxford_pets",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        terms="CC BY-SA 4.0; the photographs belong to their owners",
        archives=(
            Archive(f"{OXFORD}/pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", {"images": "images"}),
        ),
    ),
    DatasetSpec(
        name="stanford_cars",
        folder="stanford_cars",
        images="",  # paths in the split start with cars_train/ or cars_test/
        split_file="split_zhou_StanfordCars.json",
        num_classes=196,
        counts=(6_509, 1_635, 8_041),
        names="stanford_cars",
        source="https://ai.stanford.edu/~jkrause/cars/car_dataset.html (users report dead links: look for a mirror)",
        terms=f"{RESEARCH}, as ImageNet",
        archives=(
            Archive(f"{STANFORD}/cars_train.tgz", "065e5b463ae28d29e77c1b4b166cfe61", {"cars_train": "cars_train"}),
            Archive(f"{STANFORD}/cars_test.tgz", "4ce7ebf6a94d07f1952d94dd34c4d501", {"cars_test": "cars_test"}),
        ),
    ),
    DatasetSpec(
        name="oxford_flowers",
        folder="oxford_flowers",
        images="jpg",
        split_file="split_zhou_OxfordFlowers.json",
        num_classes=102,
        counts=(4_093, 1_633, 2_463),
        template="a photo of a {}, a type of flower.",
        names="oxford_flowers",
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        terms=UNSTATED,
        archives=(Archive(f"{OXFORD}/flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", {"jpg": "jpg"}),),
    ),
    DatasetSpec(
        name="food101",
        folder="food-101",
        images="images",
        split_file="split_zhou_Food101.json",
        num_classes=101,
        counts=(50_500, 20_200, 30_300),
        template="a photo of {}, a type of food.",
        names="food101",
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        terms="the photographs belong to foodspotting.com: no use beyond scientific fair use",
        archives=(
            Archive(
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                "85eeb15f3717b99a5da872d97d918f87",
                {"food-101/images": "images"},
            ),
            Archive(f"{DRIVE}1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl", name="split_zhou_Food101.json"),
        ),
    ),
    DatasetSpec(
        name="fgvc_aircraft",
        folder="fgvc_aircraft",
        images="images",
        split_file="images_variant_train.txt",
        num_classes=100,
        counts=(3_334, 3_333, 3_333),
        template="a photo of a {}, a type of aircraft.",
        names="fgvc_aircraft",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        terms=RESEARCH,
        archives=(
            Archive(
                f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", places={"fgvc-aircraft-2013b/data": ""}
            ),
        ),
        layout="aircraft",
    ),
    DatasetSpec(
        name="sun397",
        folder="sun397",
        images="SUN397",
        split_file="split_zhou_SUN397.json",
        num_classes=397,
        counts=(15_880, 3_970, 19_850),
        names="sun397",
        source="https://vision.princeton.edu/projects/2010/SUN/ (users report dead links: look for a mirror)",
        terms="research only; the photographs belong to their owners",
        archives=(
            Archive(
                "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
                "8ca2778205c41d23104230ba66911c7a",
                {"SUN397": "SUN397"},
            ),
            Archive(f"{DRIVE}1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq", name="split_zhou_SUN397.json"),
        ),
    ),
    DatasetSpec(
        name="dtd",
        folder="dtd",
        images="images",
        split_file="split_zhou_DescribableTextures.json",
        num_classes=47,
        counts=(2_820, 1_128, 1_692),
        template="{} texture.",
        names="dtd",
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        terms="research only",
        archives=(
            Archive(
                f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", {"dtd/images": "images"}
            ),
        ),
    ),
    DatasetSpec(
        name="eurosat",
        folder="eurosat",
        images="2750",
        split_file="split_zhou_EuroSAT.json",
        num_classes=10,
        counts=(13_500, 5_400, 8_100),
        template="a centered satellite photo of {}.",
        names="eurosat",
        source="https://github.com/phelber/EuroSAT",
        terms="MIT; the images are Copernicus Sentinel data",
        archives=(
            Archive(
                f"{HF}/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                "c8fa014336c82ac7804f0398fcb19387",
                {"2750": "2750"},
            ),
        ),
    ),
    DatasetSpec(
        name="ucf101",
        folder="ucf101",
        images="UCF-101-midframes",
        split_file="split_zhou_UCF101.json",
        num_classes=101,
        counts=(7_639, 1_898, 3_783),
        template="a photo of a person doing {}.",
        names="ucf101",
        source="https://www.crcv.ucf.edu/data/UCF101.php",
        terms=UNSTATED,
        archives=(
            Archive(
                f"{DRIVE}10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O",
                places={"UCF-101-midframes": "UCF-101-midframes"},
                name="UCF-101-midframes.zip",
            ),
        ),
    ),
    # ImageNet's variants have only a test part and are tested with heads trained on ImageNet.
    DatasetSpec(
        name="imagenetv2",
        folder="imagenetv2",
        images="imagenetv2-matched-frequency-format-val",
        num_classes=1000,
        counts=(0, 0, 10_000),
        names="imagenet",
        source="https://github.com/modestyachts/ImageNetV2",
        terms=UNSTATED,
        archives=(
            Archive(
                f"{HF}/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
                places={"imagenetv2-matched-frequency-format-val": "imagenetv2-matched-frequency-format-val"},
            ),
        ),
        layout="imagenet variant",
    ),
    DatasetSpec(
        name="imagenet_sketch",
        folder="imagenet-sketch",
        images="images",
        num_classes=1000,
        counts=(0, 0, 50_889),
        names="imagenet",
        source="https://github.com/HaohanWang/ImageNet-Sketch",
        terms=UNSTATED,
        archives=(
            Archive(
                f"{HF}/songweig/imagenet_sketch/resolve/main/data/ImageNet-Sketch.zip", places={"sketch": "images"}
            ),
        ),
        layout="imagenet variant",
    ),
    DatasetSpec(
        name="imagenet_a",
        folder="imagenet-adversarial",
        images="imagenet-a",
        num_classes=200,
        counts=(0, 0, 7_500),
        source="https://github.com/hendrycks/natural-adv-examples",
        terms=UNSTATED,
        archives=(
            Archive(f"{BERKELEY}/imagenet-a.tar", "c3e55429088dc681f30d81f4726b6595", {"imagenet-a": "imagenet-a"}),
        ),
        layout="imagenet variant",
    ),
    DatasetSpec(
        name="imagenet_r",
        folder="imagenet-rendition",
        images="imagenet-r",
        num_classes=200,
        counts=(0, 0, 30_000),
        source="https://github.com/hendrycks/imagenet-r",
        terms=UNSTATED,
        archives=(
            Archive(f"{BERKELEY}/imagenet-r.tar", "a61312130a589d0ca1a8fca1f2bd3337", {"imagenet-r": "imagenet-r"}),
        ),
        layout="imagenet variant",
    ),
    # PACS: trained on photographs, tested on all images of another style.
    _pacs("photo", layout="style", shifts=("pacs_art_painting", "pacs_cartoon", "pacs_sketch")),
    *(_pacs(style, layout="test style") for style in ("art_painting", "cartoon", "sketch")),
    DatasetSpec(
        name="digits",
        folder=None,
        num_classes=10,
        template="a photo of the number {}.",
        names="digits",
        source="scikit-learn: pip install scikit-learn",
        layout="digits",
    ),
    DatasetSpec(name="folder", folder="", source="your own images, one folder per class", layout="folder"),
]

SOURCES = [  # datasets named by their location; `name` is the prefix of their names
    DatasetSpec(name=HUB_SCHEME, folder=None, source=HUB_SYNTAX, layout="hub"),
    DatasetSpec(name=SHARD_SCHEME, folder=None, source="wds://FOLDER or wds://PATTERN.tar", layout="shards"),
]

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}
VARIANTS = list(DATASETS["imagenet"].shifts)


def list_datasets() -> list[str]:
    """Names of the 11 datasets of the few-shot protocol."""
    return [name for name, spec in DATASETS.items() if spec.counts and name not in VARIANTS]


def find_spec(name: str) -> DatasetSpec:
    """The table's entry for `name`; ZooError with the nearest names if it is unknown."""
    if name in DATASETS:
        return DATASETS[name]
    for spec in SOURCES:
        if name.startswith(spec.name):
            return replace(spec, name=name)
    guesses = nearest(name, DATASETS)
    valid = f"Nearest: {', '.join(guesses)}." if guesses else f"Choose one of: {', '.join(DATASETS)}."
    others = ", ".join(spec.source for spec in SOURCES)
    raise ZooError(f"Unknown dataset {name!r}. {valid} Other sources: {others}.")


def is_own(name: str) -> bool:
    """Whether a name stands for images of the user's choice: a folder, a Hub dataset or shards."""
    return find_spec(name).num_classes is None
