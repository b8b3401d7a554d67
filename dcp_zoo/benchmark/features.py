"""Trials on given image features, for methods that need nothing else: no image is read and no CLIP is loaded.

A folder holds one file DATASET.npz per dataset:

    classnames         (C,)
    test_vector        (n, E) image features, test_label (n,)
    trainK_vector      (m, E), trainK_label (m,) for each number K of shots
    valK_vector, valK_label     optional: few-shot validation images
    text_vector        optional: (C, E) text features of the class names in the dataset's template
    logit_scale        optional: exp(logit_scale) of the CLIP, by default 100
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from dcp_zoo.data import Item, find_spec
from dcp_zoo.errors import ZooError
from dcp_zoo.files import sha256_of
from dcp_zoo.training.sources import ImageSource, Progress, no_progress

SCALE = 100.0


class GivenSplit(NamedTuple):
    """What a trial reads of a dataset."""

    classnames: list[str]
    sha256: str


class GivenCLIP:
    """Stands in for `FrozenCLIP`: an "image" is its features.

    Attributes:
        texts: text features (E,) by class name.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.texts: dict[str, torch.Tensor] = {}
        self.scale = SCALE

    def encode_image(self, features: torch.Tensor, patches: bool = False) -> torch.Tensor:
        return features

    def encode_sentences(self, classnames: Sequence[str], template: str) -> torch.Tensor:
        missing = [name for name in classnames if name not in self.texts]
        if missing:
            raise ZooError(
                f"The features have no text_vector for {', '.join(missing[:3])}: choose a method that reads images "
                "alone, such as linear-probe, or gda with --set text=false."
            )
        return torch.stack([self.texts[name] for name in classnames])

    def zero_shot_classifier(self, classnames: Sequence[str], template: str) -> torch.Tensor:
        return F.normalize(self.encode_sentences(classnames, template), dim=-1)

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        return self.scale * image_features @ text_features.T


class GivenFeatures:
    """Stands in for `TrialImages`.

    Args:
        folder: with the files, see the module.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clip, self.device = GivenCLIP(), GivenCLIP.device
        self.progress: Progress = no_progress

    def split(self, dataset: str, part: str = "all") -> GivenSplit:
        """The dataset's class names; ZooError if there is no such file, or for a part of the classes."""
        if part != "all":
            raise ZooError("--features runs the few-shot protocol only.")
        path, arrays = self._read(dataset)
        names = [str(name) for name in arrays["classnames"]]
        self.clip.scale = float(arrays.get("logit_scale", SCALE))
        if "text_vector" in arrays:
            self.clip.texts = dict(zip(names, _vectors(arrays["text_vector"]), strict=True))
        return GivenSplit(names, sha256_of(path))

    def test(self, dataset: str, part: str) -> ImageSource:
        return self._source(dataset, "test")

    def train(
        self, dataset: str, part: str, shots: int, seed: int, augment: str
    ) -> tuple[ImageSource, ImageSource | None, str]:
        """Training features, validation features if there are any, and the hash of the training features."""
        if seed != 1:
            raise ZooError("The features are of one draw of the training images: pass --seeds 1.")
        train, val = self._source(dataset, f"train{shots}"), None
        if f"val{shots}_vector" in self._read(dataset)[1]:
            val = self._source(dataset, f"val{shots}")
        assert train.views is not None
        return train, val, hashlib.sha256(train.views.numpy().tobytes()).hexdigest()

    def _source(self, dataset: str, part: str) -> ImageSource:
        path, arrays = self._read(dataset)
        for name in (f"{part}_vector", f"{part}_label"):
            if name not in arrays:
                raise ZooError(f"{path} has no {name}: it has {', '.join(sorted(arrays))}.")
        labels, classes = arrays[f"{part}_label"].tolist(), len(arrays["classnames"])
        if len(labels) != len(arrays[f"{part}_vector"]) or not all(0 <= label < classes for label in labels):
            raise ZooError(
                f"{path} needs one label from 0 to {classes - 1} in {part}_label for each row of {part}_vector."
            )
        items = [Item(f"{part} {i}", f"{part} {i}", int(label)) for i, label in enumerate(labels)]
        return ImageSource(self.clip, items, str, views=_vectors(arrays[f"{part}_vector"])[None])  # type: ignore[arg-type]

    def _read(self, dataset: str) -> tuple[Path, dict[str, Any]]:
        find_spec(dataset)
        path = self.folder / f"{dataset}.npz"
        if not path.is_file():
            found = ", ".join(sorted(file.stem for file in self.folder.glob("*.npz"))) or "no .npz files"
            raise ZooError(f"There is no file {path}: {self.folder} has {found}.")
        return path, _load(path)


@cache
def _load(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def _vectors(array: Any) -> torch.Tensor:
    """Normalised vectors in float32."""
    return F.normalize(torch.from_numpy(np.asarray(array, np.float32)), dim=-1)
