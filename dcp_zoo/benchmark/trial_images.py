"""The CLIP and the images shared by all trials of a process: read and run through the frozen stem once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch

from dcp_zoo.benchmark import plan
from dcp_zoo.data import Item, Split, few_shot, subsample_classes
from dcp_zoo.data.dataset import CACHE_BYTES
from dcp_zoo.training.device import pick_device, pick_precision, total_memory
from dcp_zoo.training.sources import ImageSource, Progress, image_source, no_progress
from dcp_zoo.zoo.factory import plain_clip

CPU = torch.device("cpu")
IMAGE_BYTES = 3 * 500 * 375  # of a decoded image of typical size


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
