"""The CLIP and the images shared by all trials of a process: read and run through the frozen stem once; or the features
given in their place, for methods that need nothing else, in files as docs/benchmarks.md says under "On features alone".
"""

import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.benchmark import plan
from dcp_zoo.benchmark.plan import SEEDS, Trial, plan_trials
from dcp_zoo.data import Item, Split, few_shot, subsample_classes
from dcp_zoo.data.dataset import CACHE_BYTES
from dcp_zoo.data.specs import DATASETS
from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.fields import Values
from dcp_zoo.files import sha256_of
from dcp_zoo.model.classes import Texts
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.inputs import Features
from dcp_zoo.training.device import pick_device, pick_precision, total_memory
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.sources import ImageSource, Progress, image_source, no_progress
from dcp_zoo.zoo.factory import plain_clip

CPU = torch.device("cpu")
IMAGE_BYTES = 3 * 500 * 375  # of a decoded image of typical size
SCALE = 100.0  # of logits, if the features come without


class TrialImages:
    """Image sources for one CLIP, cached up to a quarter of the machine's memory; the least recently used go first."""

    def __init__(self, model: str, device: str, data_root: Path | None, workers: int, precision: str) -> None:
        self.device = pick_device(device)
        self.precision = pick_precision(precision, model, self.device)
        self.clip = plain_clip(model).to(self.device)
        self.data_root, self.workers = data_root, workers
        self.progress: Progress = no_progress
        self._sources: OrderedDict[tuple, ImageSource] = OrderedDict()

    def split(self, dataset: str, part: str = "all") -> Split:
        """The dataset, or only its "base" or "new" classes."""
        return subsample_classes(plan.read_split(dataset, self.data_root), part)

    def subset(self, dataset: str, part: str, shots: int, seed: int) -> Split:
        """With few-shot images, drawn before half of the classes is selected, as in CoOp; without shots, all."""
        whole = self.split(dataset)
        return subsample_classes(few_shot(whole, shots, seed) if shots else whole, part)

    def read(self, items: Sequence[Item], augment: str = "none", once: bool = False) -> ImageSource:
        """The source of these images, see `training.run.Reader`; what is read is shared by trials, `once` or not."""
        # images in memory have no hash, and as the splits keep them, no other gets their id
        content = tuple((i.label, i.path if isinstance(i.path, str) else id(i.path)) for i in items)
        flipped = self._sources.get((content, "flip"))
        if augment == "none" and flipped is not None and flipped.views is not None:
            return self._cache((content, "flip"), lambda: flipped)  # its first view is the plain one
        make = partial(image_source, self.clip, items, augment, self.workers, self.progress, precision=self.precision)
        return self._cache((content, augment), make)

    def _cache(self, key: tuple, make: Callable[[], ImageSource]) -> ImageSource:
        if key not in self._sources:
            source = self._sources[key] = make()
            if source.views is not None:
                source.__dict__.pop("dataset", None)  # free the decoded images, up to a gigabyte: the maps replace them
        self._sources.move_to_end(key)
        while len(self._sources) > 3 and sum(map(_bytes, self._sources.values())) > total_memory(CPU) / 4:
            self._sources.popitem(last=False)
        return self._sources[key]


def _bytes(source: ImageSource) -> int:
    """Approximate memory of a source: patch maps, or decoded images."""
    return min(CACHE_BYTES, len(source.items) * IMAGE_BYTES) if source.views is None else source.views.nbytes


shared_images = lru_cache(maxsize=1)(TrialImages)  # those for the previous model are freed


def nothing_read(*_: object, **__: object) -> torch.Tensor:
    """What would read images or sentences, where their features are given."""
    raise NotImplementedError


class GivenCLIP(FrozenCLIP):
    """A CLIP whose "images" are their features (B, E), or (B, E + V) beside those of its backbone.

    Attributes:
        given_texts: text features (E,) by class name.
        backbone_width: V.
    """

    def __init__(self) -> None:
        clip = nn.Module()
        clip.logit_scale = nn.Parameter(torch.tensor(SCALE).log(), requires_grad=False)
        clip.visual = nn.Module()
        super().__init__(clip, nothing_read)
        self.given_texts: dict[str, torch.Tensor] = {}
        self.backbone_width = 0

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.num_features, self.backbone_width) if self.backbone_width else (self.num_features,)

    def encode_sentences(self, classnames: Sequence[str], texts: Texts) -> torch.Tensor:
        return torch.stack([self.given_texts[name] for name in classnames])


class GivenFeatures:
    """`TrialImages` of a folder with features."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.device = folder, CPU
        self.clip = GivenCLIP()
        self.progress: Progress = no_progress

    def split(self, dataset: str, part: str = "all") -> Split:
        return self.subset(dataset, part, 0, DRAW)

    def subset(self, dataset: str, part: str, shots: int, seed: int) -> Split:
        """Its items' paths are (file, name of the array, row)."""
        path = self.folder / f"{dataset}.npz"
        arrays = _arrays(path)
        names = [str(name) for name in arrays["classnames"]]
        self.clip.clip.logit_scale.fill_(float(arrays.get("logit_scale", SCALE))).log_()
        self.clip.clip.output_dim = arrays["test_vector"].shape[1]
        self.clip.backbone_width = arrays["test_backbone"].shape[1] if "test_backbone" in arrays else 0
        if TEXT_ARRAY in arrays:
            self.clip.given_texts = dict(zip(names, _vectors(arrays[TEXT_ARRAY]), strict=True))
        parts = (f"train{shots}", f"val{shots}", "test")
        train, val, test = (_items(path, name) if f"{name}_vector" in arrays else [] for name in parts)
        return GivenSplit(dataset, names, train, val, test, place=str(path))

    def read(self, items: Sequence[Item], augment: str = "none", once: bool = False) -> ImageSource:
        path, name, _ = items[0].path
        kinds = ("vector", "backbone") if self.clip.backbone_width else ("vector",)
        views = torch.cat([_vectors(_arrays(path)[f"{name}_{kind}"]) for kind in kinds], -1)[None]
        return ImageSource(self.clip, items, nothing_read, views=views, form=Features)


class GivenSplit(Split):
    """The split of a file with features, whose hash is the file's."""

    @cached_property
    def sha256(self) -> str:
        return sha256_of(Path(self.place))


def _items(path: Path, name: str) -> list[Item]:
    arrays = _arrays(path)
    vectors, labels, classes = arrays[f"{name}_vector"], arrays[f"{name}_label"].tolist(), len(arrays["classnames"])
    if len(labels) != len(vectors) or not all(0 <= label < classes for label in labels):
        raise ZooError(f"{path} needs one label from 0 to {classes - 1} in {name}_label for each row of {name}_vector.")
    return [Item((path, name, i), f"{name} {i}", int(label)) for i, label in enumerate(labels)]


@cache
def _arrays(path: Path) -> Values:
    with np.load(path) as file:
        return dict(file)


def _vectors(array: np.ndarray) -> torch.Tensor:
    """Normalised vectors in float32."""
    return F.normalize(torch.from_numpy(np.asarray(array, np.float32)), dim=-1)


DRAW = 1  # the seed of the trials: the files hold one draw of the training images
TEXT_ARRAY = "text_vector"


def plan_given(
    folder: Path,
    protocol: str,
    models: Sequence[str],
    methods: Sequence[str] = (),
    datasets: Sequence[str] = (),
    shots: Sequence[int] = (),
    seeds: Sequence[int] = (),
    options: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[list[Trial], str]:
    """The trials of a grid, see `plan_trials`, that the files in a folder allow, and what was left out, or ""."""
    able = [name for name, method in METHODS.items() if method.features]
    if protocol != "few-shot":
        raise ZooError("--features runs the few-shot protocol only.")
    if not models:
        raise ZooError("--features needs the model whose CLIP made them, such as --models dcp_vitb32.")
    for method in methods:
        if method in METHODS and method not in able:
            raise ZooError(f"{method} needs images, not only features: with --features choose from {', '.join(able)}.")
    if set(seeds) - {DRAW}:
        raise ZooError(f"The features are of one seed's training images: pass --seeds {DRAW}, or omit --seeds.")
    found = sorted(path.stem for path in folder.glob("*.npz"))
    names = datasets or [name for name in DATASETS if name in found]
    has = f"{folder} has {', '.join(found) or 'no .npz files'}"
    if not names:
        raise ZooError(f"There is no file that is named after a dataset, such as caltech101.npz: {has}.")
    if absent := [name for name in names if name not in found]:
        raise ZooError(f"There is no file {folder / absent[0]}.npz: {has}.")
    files = {name: array_names(folder / f"{name}.npz") for name in names}
    matches = (re.fullmatch(r"train(\d+)_vector", array) for arrays in files.values() for array in arrays)
    shots_found = sorted({int(match[1]) for match in matches if match})
    trials = plan_trials(protocol, models, methods or able, names, shots or shots_found, [DRAW], options)
    lacking = {trial: array for trial in trials if (array := lacking_array(trial, files[trial.dataset]))}
    kept = [trial for trial in trials if trial not in lacking]
    left_out = [f"{name}.npz has no {a}" for name, a in dict.fromkeys((t.dataset, a) for t, a in lacking.items())]
    if not kept:
        problem = f"The files in {folder} allow none of these trials: {'; '.join(left_out)}."
        alone = "Methods that read images alone, such as linear-probe, or gda with --set text=false"
        raise ZooError(f"{problem} {alone}, need no {TEXT_ARRAY}.")
    if not datasets and (others := [f"{name}.npz" for name in found if name not in files]):
        left_out.append(f"{', '.join(others)} (not named after a dataset)")
    if not methods:
        left_out.append(f"{', '.join(name for name in METHODS if name not in able)} (they need images)")
    if not seeds:
        left_out.append(f"seeds {', '.join(str(s) for s in SEEDS if s != DRAW)} (the features are of one seed)")
    return kept, "; ".join(left_out)


def array_names(path: Path) -> set[str]:
    with as_zoo_error(f"{path} cannot be read: {{}}.", OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        names = {name.removesuffix(".npy") for name in file.namelist()}
    for name in ("classnames", "test_vector", "test_label"):
        if name not in names:
            raise ZooError(f"{path} has no {name}: it has {', '.join(sorted(names))}.")
    return names


def lacking_array(trial: Trial, names: set[str]) -> str:
    """An array that a trial needs and does not have, or ""."""
    reads_names = METHODS[trial.method].text and getattr(trial.recipe, "text", True)
    needed = [TEXT_ARRAY] if reads_names else []
    kinds = ["vector", "label"] + ["backbone"] * ("test_backbone" in names)
    needed += [f"train{trial.shots}_{kind}" for kind in kinds] if trial.shots else []
    return next((name for name in needed if name not in names), "")
