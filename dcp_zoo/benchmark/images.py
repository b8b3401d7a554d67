"""The CLIP and the images shared by all trials of a process: read and run through the frozen stem once."""

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from dcp_zoo.data import Split, few_shot, load_split, subsample_classes, subset_sha256
from dcp_zoo.data.dataset import CACHE_BYTES
from dcp_zoo.training.device import pick_device, total_memory
from dcp_zoo.training.methods.base import plain_clip
from dcp_zoo.training.sources import ImageSource, Progress, image_source, no_progress
from dcp_zoo.zoo.factory import create_transform

CPU = torch.device("cpu")
IMAGE_BYTES = 3 * 500 * 375  # of a decoded image of typical size


@lru_cache(maxsize=1)
def images_of(model: str, device: str, data_root: Path | None, workers: int) -> "TrialImages":
    """The images for one model; those for the previous model are freed."""
    return TrialImages(model, device, data_root, workers)


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

    def train(
        self, dataset: str, part: str, shots: int, seed: int, augment: str
    ) -> tuple[ImageSource, ImageSource | None, str]:
        """Few-shot training images, validation images if there are any, and the hash of the training images.

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
