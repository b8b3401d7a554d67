"""The CLIP and the images shared by all trials of a process: read and run through the frozen stem once, or given as
features."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.benchmark.features import TEXT_ARRAY, plan_given
from dcp_zoo.benchmark.trial import Settings, Trial
from dcp_zoo.data import Item, Split, few_shot, load_split, subsample_classes, subset_sha256
from dcp_zoo.data.dataset import CACHE_BYTES
from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts
from dcp_zoo.training.device import pick_device, total_memory
from dcp_zoo.training.sources import ImageSource, Progress, image_source, no_progress
from dcp_zoo.zoo.factory import create_transform, plain_clip

CPU = torch.device("cpu")
IMAGE_BYTES = 3 * 500 * 375  # of a decoded image of typical size
SCALE = 100.0  # of logits, if the features come without

Sources = tuple[ImageSource, ImageSource | None, str]  # training images, validation images, hash of the former


def images_of(trial: Trial, settings: Settings) -> "TrialImages | GivenFeatures":
    """The images of a trial, or the features given in their place; ZooError if these do not allow the trial."""
    if settings.features is None:
        return shared_images(trial.model, settings.device, settings.data_root, settings.workers)
    grid: dict[str, Any] = {"methods": [trial.method], "datasets": [trial.dataset]}
    grid |= {"shots": [trial.shots], "seeds": [trial.seed]} if trial.shots else {}
    options = {name: [value] for name, value in trial.options}
    plan_given(settings.features, trial.protocol, [trial.model], **grid, options=options)
    return GivenFeatures(settings.features)


class TrialImages:
    """Image sources for one CLIP, cached up to a quarter of the machine's memory; the least recently used go first.

    Args:
        model, device, data_root, workers: see `Settings` and `Trial`.
    """

    def __init__(self, model: str, device: str, data_root: Path | None, workers: int) -> None:
        self.device = pick_device(device)
        self.clip = plain_clip(model).to(self.device)
        self.data_root, self.workers = data_root, workers
        self.progress: Progress = no_progress
        self._splits: dict[str, Split] = {}
        self._sources: OrderedDict[tuple, ImageSource] = OrderedDict()

    def split(self, dataset: str, part: str = "all") -> Split:
        """The dataset, or only its "base" or "new" classes."""
        if dataset not in self._splits:
            self._splits[dataset] = load_split(dataset, self.data_root)
        return subsample_classes(self._splits[dataset], part)

    def test(self, dataset: str, part: str) -> ImageSource:
        """The test images."""
        items = self.split(dataset, part).test
        return self._cache((dataset, part), lambda: image_source(self.clip, items, "none", self.workers, self.progress))

    def train(self, dataset: str, part: str, shots: int, seed: int, augment: str) -> Sources:
        """Few-shot training images, and validation images if there are any.

        As in CoOp, images are drawn for all classes before one half of the classes is selected.
        """
        subset = subsample_classes(few_shot(self.split(dataset), shots, seed), part)
        name = (dataset, part, shots, seed)
        flipped = self._sources.get((*name, "flip"))
        if augment == "none" and flipped is not None and flipped.views is not None:
            augment = "flip"  # its first view is the plain one
        train = self._cache(
            (*name, augment), lambda: image_source(self.clip, subset.train, augment, self.workers, self.progress)
        )
        val = None
        if subset.val:  # without patch maps: only some methods read these, and only once
            plain = create_transform(self.clip)
            val = self._cache((*name, "val"), lambda: ImageSource(self.clip, subset.val, plain, workers=self.workers))
        return train, val, subset_sha256(subset.train)

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


# ------------------------------------------------------------------------------------------------------- given features


class GivenSplit(NamedTuple):
    """What a trial reads of a dataset."""

    classnames: list[str]
    sha256: str


class GivenCLIP(FrozenCLIP):
    """A CLIP whose "images" are their features (B, E).

    Attributes:
        texts: text features (E,) by class name.
    """

    def __init__(self) -> None:
        clip = nn.Module()
        clip.logit_scale = nn.Parameter(torch.tensor(SCALE).log(), requires_grad=False)
        super().__init__(clip, tokenizer=str)  # type: ignore[arg-type]  # reads no sentences
        self.texts: dict[str, torch.Tensor] = {}

    def encode_image(self, images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return images

    def encode_sentences(self, classnames: Sequence[str], texts: Texts) -> torch.Tensor:
        return torch.stack([self.texts[name] for name in classnames])


class GivenFeatures:
    """`TrialImages` of a folder with features, see `features`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.device = folder, CPU
        self.clip = GivenCLIP()
        self.progress: Progress = no_progress

    def split(self, dataset: str, part: str = "all") -> GivenSplit:
        path = self.folder / f"{dataset}.npz"
        arrays = _arrays(path)
        names = [str(name) for name in arrays["classnames"]]
        self.clip.clip.logit_scale.fill_(float(arrays.get("logit_scale", SCALE))).log_()
        if TEXT_ARRAY in arrays:
            self.clip.texts = dict(zip(names, _vectors(arrays[TEXT_ARRAY]), strict=True))
        return GivenSplit(names, sha256_of(path))

    def test(self, dataset: str, part: str) -> ImageSource:
        return self._source(dataset, "test")

    def train(self, dataset: str, part: str, shots: int, seed: int, augment: str) -> Sources:
        train, val = self._source(dataset, f"train{shots}"), None
        if f"val{shots}_vector" in _arrays(self.folder / f"{dataset}.npz"):
            val = self._source(dataset, f"val{shots}")
        assert train.views is not None
        return train, val, hashlib.sha256(train.views.numpy().tobytes()).hexdigest()

    def _source(self, dataset: str, part: str) -> ImageSource:
        path = self.folder / f"{dataset}.npz"
        arrays = _arrays(path)
        vectors, labels, classes = arrays[f"{part}_vector"], arrays[f"{part}_label"].tolist(), len(arrays["classnames"])
        if len(labels) != len(vectors) or not all(0 <= label < classes for label in labels):
            raise ZooError(
                f"{path} needs one label from 0 to {classes - 1} in {part}_label for each row of {part}_vector."
            )
        items = [Item(f"{part} {i}", f"{part} {i}", int(label)) for i, label in enumerate(labels)]
        return ImageSource(self.clip, items, str, views=_vectors(vectors)[None])  # type: ignore[arg-type]


@cache
def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def _vectors(array: Any) -> torch.Tensor:
    """Normalised vectors in float32."""
    return F.normalize(torch.from_numpy(np.asarray(array, np.float32)), dim=-1)
