"""`dcp-zoo benchmark few-shot` on image features in place of images and CLIP, for methods that need nothing
else.

    python benchmarks/given_features.py FEATURES --model dcp_vitb32 --output SWEEP

FEATURES has one `DATASET.npz` per dataset, with `classnames` (C,), `test_vector` (n, E), `test_label` (n,),
`trainK_vector` and `trainK_label` for each number K of images per class and, optionally, `valK_vector`,
`valK_label`, `text_vector` (C, E), of the class names in the dataset's template, `test_backbone` (n, V) and
`trainK_backbone`, what a text probe reads besides, and `logit_scale`, exp(logit_scale) of the CLIP, by
default 100. Trials for which the files lack something are left out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from typer import Argument, Option, Typer

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.towers.open_clip import EMBEDDING, HIDDEN
from dcp_zoo.benchmark import Settings, Trial, plan_trials
from dcp_zoo.benchmark.plan import made_by
from dcp_zoo.benchmark.sweep import Event, execute, sweep
from dcp_zoo.cli import main
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.benchmark import check_succeeded, numbers, show_event, show_results, split_commas
from dcp_zoo.data import Item, Split
from dcp_zoo.data.packaged import DATASETS
from dcp_zoo.errors import ZooError
from dcp_zoo.features.cache import FeatureCache
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import MIRRORED, PLAIN
from dcp_zoo.fields import Values
from dcp_zoo.files import check_writable, sha256_of
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.run import Source

app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
SCALE = 100.0  # of logits, if the features come without
DRAW = 1  # the seed of the trials: the files hold one draw of the training images
TEXT_ARRAY = "text_vector"
TRAIN_ARRAY = re.compile(r"train\d+_vector")


def nothing_read(*_: object, **__: object) -> torch.Tensor:
    """What would read images or sentences, where their features are given."""
    raise NotImplementedError


class GivenCLIP(FrozenCLIP):
    """A CLIP whose "images" are their features (B, E), or (B, E + V) beside those of its backbone.

    Attributes:
        given_texts: text features (E,) by class name.
        further: V, by the name of the part, see `FrozenCLIP.parts`.
    """

    def __init__(self) -> None:
        clip = nn.Module()
        clip.logit_scale = nn.Parameter(torch.tensor(SCALE).log(), requires_grad=False)
        clip.visual = nn.Module()
        super().__init__(clip, nothing_read)
        self.given_texts: dict[str, torch.Tensor] = {}
        self.further: dict[str, int] = {}

    @property
    def parts(self) -> dict[str, int]:
        return {EMBEDDING: self.num_features} | self.further

    def encode_sentences(self, classnames: Sequence[str], texts: Texts) -> torch.Tensor:
        return torch.stack([self.given_texts[name] for name in classnames])


class GivenFeatures(Source):
    """`sweep.TrialImages` of a folder with features."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = torch.device("cpu")
        self.clip = GivenCLIP()
        self.extract = FeatureExtractor(self.clip)
        self.features = FeatureCache()

    def split(self, dataset: str, part: str = "all") -> Split:
        return self.subset(dataset, part, 0, DRAW)

    def subset(self, dataset: str, part: str, shots: int, seed: int) -> Split:
        """Its items' paths are (file, name of the array, row)."""
        path = self.folder / f"{dataset}.npz"
        arrays = _arrays(path)
        names = [str(name) for name in arrays["classnames"]]
        self.clip.clip.logit_scale.fill_(float(arrays.get("logit_scale", SCALE))).log_()
        self.clip.clip.output_dim = arrays["test_vector"].shape[1]
        self.clip.further = {HIDDEN: arrays["test_backbone"].shape[1]} if "test_backbone" in arrays else {}
        if TEXT_ARRAY in arrays:
            self.clip.given_texts = dict(zip(names, unit_vectors(arrays[TEXT_ARRAY]), strict=True))
        parts = (f"train{shots}", f"val{shots}", "test")
        train, val, test = (_items(path, name) if f"{name}_vector" in arrays else [] for name in parts)
        return GivenSplit(dataset, names, train, val, test, source=str(path))

    def read(self, items: Sequence[Item], augment: str = "none", again: bool = False) -> ImageLoader:
        if not items:  # of a trial without training images
            return ImageLoader.of_features(FeatureTable([], {}, []))
        path, name, _ = items[0].path
        kinds = ("vector", "backbone") if self.clip.further else ("vector",)
        parts = [unit_vectors(_arrays(path)[f"{name}_{kind}"]) for kind in kinds]
        return ImageLoader.of_features(given_table(items, [parts]))


def given_table(items: Sequence[Item], views: Sequence[Sequence[torch.Tensor]]) -> FeatureTable:
    """A table of parts (n, ..) that are given for each image, and for a second view for its mirror image."""
    rows = {view: torch.cat([*parts], -1) for view, parts in zip((PLAIN, MIRRORED), views, strict=False)}
    return FeatureTable(items, rows, [tuple(part.shape[-1] for part in views[0])])


class GivenSplit(Split):
    """The split of a file with features, whose hash is the file's."""

    @cached_property
    def sha256(self) -> str:
        return sha256_of(Path(self.source))


def _items(path: Path, name: str) -> list[Item]:
    arrays = _arrays(path)
    vectors = arrays[f"{name}_vector"]
    labels = arrays[f"{name}_label"].tolist()
    classes = len(arrays["classnames"])
    if len(labels) != len(vectors) or not all(0 <= label < classes for label in labels):
        raise ZooError(f"{path} needs one label from 0 to {classes - 1} in {name}_label for each row of {name}_vector.")
    return [Item((path, name, i), f"{name} {i}", int(label)) for i, label in enumerate(labels)]


@cache
def _arrays(path: Path) -> Values:
    with np.load(path) as file:
        return dict(file)


def unit_vectors(array: np.ndarray) -> torch.Tensor:
    """Normalised vectors in float32."""
    return F.normalize(torch.from_numpy(np.asarray(array, np.float32)), dim=-1)


def plan_given(
    folder: Path,
    model: str,
    methods: Sequence[str] = (),
    datasets: Sequence[str] = (),
    shots: Sequence[int] = (),
    options: Mapping[str, Sequence[Any]] | None = None,
) -> list[Trial]:
    """The trials of a grid, see `plan_trials`, that the files in a folder allow."""
    able = [name for name, method in METHODS.items() if method.features]
    unable = {*methods} - {*able}
    if unable:
        raise ZooError(f"{', '.join(unable)} needs images, not only features: choose from {', '.join(able)}.")
    names = datasets or [name for name in DATASETS if (folder / f"{name}.npz").exists()]
    files = {name: set(_arrays(folder / f"{name}.npz")) for name in names}
    found = sorted({int(array[5:-7]) for arrays in files.values() for array in arrays if TRAIN_ARRAY.fullmatch(array)})
    trials = plan_trials("few-shot", [model], methods or able, names, shots or found, [DRAW], options)
    trials = [trial for trial in trials if needed(trial, files[trial.dataset]) <= files[trial.dataset]]
    if not trials:
        raise ZooError(f"The files in {folder} lack what these trials need: see the arrays in `{Path(__file__).name}`.")
    return trials


def needed(trial: Trial, names: set[str]) -> set[str]:
    """The arrays that a trial needs of a file with these."""
    reads_names = trial.method != "linear-probe" and getattr(trial.recipe, "text", True)
    kinds = ["vector", "label"] + ["backbone"] * ("test_backbone" in names)
    return ({TEXT_ARRAY} if reads_names else set()) | (
        {f"train{trial.shots}_{kind}" for kind in kinds} if trial.shots else set()
    )


@dataclass(frozen=True)
class GivenSettings(Settings):
    """Settings of a sweep on the features in a folder."""

    features: Path = Path()

    def conditions(self, trial: Trial) -> Values:
        features = sha256_of(self.features / f"{trial.dataset}.npz")[:16]
        return {
            "images": {trial.dataset: features},
            "made_by": made_by(),
            "weights": f"features of {trial.model}",
            "precision": self.precision,
            "features": features,
            "recipe": trial.recipe.as_dict(),
        }


def run_given(trials: Sequence[Trial], settings: Any) -> Iterator[Event]:
    """`run_in_process` on the features of `GivenSettings`."""
    images: Any = GivenFeatures(settings.features)
    for trial in trials:
        yield execute(trial, settings, images=images)


@app.command(cls=opt.Command)
def given(
    features: Annotated[Path, Argument(metavar="FEATURES", help="Folder of DATASET.npz files.")],
    model: Annotated[str, Option(help="The model whose CLIP made them, such as dcp_vitb32.")],
    output_dir: Annotated[Path, Option("--output", help="Folder for results; finished trials are skipped.")],
    methods: Annotated[list[str], Option(help="Default: all that need only features.")] = [],  # noqa: B006
    datasets: Annotated[list[str], Option(help="Default: those of the files.")] = [],  # noqa: B006
    shots: Annotated[list[str], Option(help="Images per class. Default: those of the files.")] = [],  # noqa: B006
    changes: Annotated[list[str], Option("--set", help="Change a field of recipes.", metavar="NAME=VALUE")] = [],  # noqa: B006
) -> None:
    """Run the few-shot protocol on given features, and gather the results."""
    grid: Values = {"methods": split_commas(methods), "datasets": split_commas(datasets)}
    grid |= {"shots": numbers(shots, "--shots"), "options": opt.parse_changes(changes)}
    trials = plan_given(features, model, **grid)
    check_writable(output_dir)
    failed = sweep(trials, GivenSettings(output_dir, features=features), run=run_given, show=show_event)
    show_results(trials, output_dir)
    check_succeeded(failed, trials)


if __name__ == "__main__":
    main(app)
