"""The images that a model reads: loaded, transformed, shuffled, and run through a frozen stem only once."""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, StackDataset, TensorDataset

from dcp_zoo.data import Item
from dcp_zoo.data.dataset import CACHE_BYTES, ImageDataset
from dcp_zoo.data.progress import Progress, no_progress
from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.head import Head
from dcp_zoo.training.cache import per_image, tower_setting
from dcp_zoo.training.device import autocast
from dcp_zoo.training.recipes import batch_sizes
from dcp_zoo.zoo.factory import create_transform

PATCH_CACHE_BYTES = 2**30  # patch maps of a hybrid CLIP are cached up to this size
VIEW_BATCH = 32  # images whose activations fit into 0.5 GB


def by_image(progress: Progress, batches: Iterable[Any], description: str, images: int) -> Iterator[Any]:
    """The batches (inputs, ...) of this many images, which the progress bar counts."""
    counted = iter(progress(range(images), description, images))
    next(counted, None)  # starts the bar at 0
    for batch in batches:
        yield batch
        deque(islice(counted, len(batch[0])), 0)


@dataclass
class ImageSource:
    """The images of a list of items, ready for `model`; `batches` can be called again while others are in use.

    Attributes:
        items: the items to read.
        model: a head, or a plain CLIP.
        views: read instead of images, if set: patch maps (views, n, Dv, h, w) of a hybrid CLIP's frozen patch
            embedding, tokens (views, n, N, Dv) that enter the first block with prompts, or features (views, n, E) of a
            frozen image tower. View 0 is the test transform's, view 1 its mirror image.
        flips: whether shuffled batches mirror each image with probability 0.5, if there are no `views`.
        crops: whether the transform crops at random, so that an image is never the same twice.
        once: whether the images are read only once, so that decoded ones need not be kept.
        precision: in which features are computed; they are kept in float32.
        targets: zero-shot CLIP's features (views, n, E) of the images, if set: shuffled batches then also give those of
            the view that they show, or of the whole image if it is cropped anew in every epoch.
    """

    model: FrozenCLIP
    items: Sequence[Item]
    transform: Callable[[Any], Tensor]
    views: Tensor | None = None
    workers: int = 0
    flips: bool = False
    crops: bool = False
    once: bool = False
    precision: str = "float32"
    targets: Tensor | None = field(default=None, init=False)
    _features: Tensor | None = field(default=None, init=False)  # of an image tower without prompts, see `features`
    _original: "ImageSource | None" = field(default=None, init=False)  # for the same image tower, which keeps these

    @cached_property
    def dataset(self) -> ImageDataset:
        """Shared by all epochs and by copies for other models, so that each file is decoded once."""
        return ImageDataset(self.items, self.transform, 0 if self.once else CACHE_BYTES)

    def for_model(self, model: FrozenCLIP) -> "ImageSource":
        """The same images, with their stored views, for another model on the same frozen patch embedding."""
        if model is self.model:
            return self
        other = copy.copy(self)
        other.model, other._features = model, None
        same = model.visual is self.model.visual and not (model.is_prompted or self.model.is_prompted)
        other._original = (self._original or self) if same else None
        return other

    def of(self, rows: Sequence[int]) -> "ImageSource":
        """The images at these positions."""
        if len(rows) == len(self.items):
            return self
        views = None if self.views is None else self.views[:, list(rows)]
        return replace(self, items=[self.items[i] for i in rows], views=views)

    @property
    def head(self) -> Head:
        """The model, where it is a head."""
        assert isinstance(self.model, Head)
        return self.model

    @property
    def patches(self) -> bool:
        """Whether batches are patch maps or tokens, for `model(inputs, patches=True)`, instead of images."""
        return self.views is not None and self.views.ndim > 3

    @property
    def has_features(self) -> bool:
        """Whether features are given, and no images."""
        return self.views is not None and self.views.ndim == 3

    @property
    def num_views(self) -> int:
        return len(self.views) if self.views is not None else 1 + self.flips

    @property
    def labels(self) -> Tensor:
        return torch.tensor([item.label for item in self.items])

    @property
    def num_classes(self) -> int:
        """Classes that have images here."""
        return len({item.label for item in self.items})

    @torch.no_grad()
    def features(self, views: int | None = None, progress: Progress = no_progress) -> Tensor:
        """Normalised features (V, n, E) of all images in order by the model's image tower, in float32 on the CPU; those
        of a tower without prompts are computed once. `views`: 1 for view 0, 2 for its mirror image as well; by default
        all that `batches` show. Given ones stay as they are."""
        if self.views is not None and self.has_features:
            return self.views[:views].float()
        if self._original is not None:
            return self._original.features(views, progress)
        count = views or self.num_views
        count = count if self.views is None else min(count, len(self.views))
        if self._features is not None and len(self._features) >= count:
            return self._features[:count]
        kept = "" if self.model.is_prompted or self.crops else "features"
        found = encode_views(self, self.model.encode_image, count, progress, kept=kept).float()
        if kept:
            self._features = found
        return found

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, *, first: int = 0, drop_last: bool = True
    ) -> Iterable[Any]:
        """(inputs, labels) batches: in order, or with a generator shuffled, augmented and of the `batch_sizes`; with
        `targets` then ((inputs, labels), targets). Random draws depend only on the generator, not on the number of
        workers or the `first` batch read."""
        n, shuffle = len(self.items), generator is not None
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        sizes = batch_sizes(n, batch_size, drop_last)
        seeds = torch.randint(2**32, (n,), generator=generator).tolist() if shuffle and self.views is None else None
        view = torch.randint(self.num_views, (n,), generator=generator) if shuffle else torch.zeros(n, dtype=torch.long)
        if self.views is None:
            dataset: Dataset[Any] = self.dataset.drawn(seeds, view.tolist())
            targets: Any = None if self.targets is None else self.targets[view, torch.arange(n)]
        else:  # the views of all images one after the other, read in place
            order = n * view[order] + order
            dataset = TensorDataset(self.views.flatten(0, 1), self.labels.repeat(len(self.views)))
            targets = None if self.targets is None else self.targets[: len(self.views)].flatten(0, 1)
        if shuffle and targets is not None:
            dataset = StackDataset(dataset, targets)
        chunks = order[: sum(sizes)].split(sizes) if shuffle else order.split(batch_size)
        batches = [batch.tolist() for batch in chunks]
        workers = self.workers if self.views is None else 0
        # without a generator DataLoader would draw from torch's global state; workers end with the epoch
        settings: dict[str, Any] = {"generator": generator or torch.Generator(), "num_workers": workers}
        pinned = workers > 0 and self.model.device.type == "cuda"
        return DataLoader(dataset, batch_sampler=batches[first:], pin_memory=pinned, **settings)


def image_source(
    model: FrozenCLIP,
    items: Sequence[Item],
    augment: str = "none",
    workers: int = 0,
    progress: Progress = no_progress,
    once: bool = False,
    precision: str = "float32",
) -> ImageSource:
    """Images for `model`, with their patch maps computed once where that saves work. A hybrid CLIP spends most of its
    time in a frozen stem, and without crops an image has at most two views; unless the images are read `once`. Items
    may have features (E,) of the image tower as their paths; ZooError for another one's, or if prompts enter it."""
    if items and isinstance(items[0].path, Tensor):
        given = torch.stack([item.path for item in items])
        if model.is_prompted or given.shape[1] != model.num_features:
            reads = "images alone, as prompts enter its tower" if model.is_prompted else f"{model.num_features} columns"
            raise ZooError(f"Features {tuple(given.shape)} do not fit: this model reads {reads}. See `transform`.")
        return ImageSource(model, items, create_transform(model), views=given[None])
    crops = augment == "crop-flip"
    source = ImageSource(
        model, items, create_transform(model, is_training=crops), workers=workers, crops=crops, once=once
    )
    stem, views = model.stem, 2 if augment == "flip" else 1
    map_bytes = 4 * math.prod(stem.grid) * stem.width if stem else 0
    if not once and not crops and stem and map_bytes * views * len(items) <= PATCH_CACHE_BYTES:

        def patch_maps(images: Tensor, patches: bool) -> Tensor:
            return stem.patch_maps(images)

        source.views = encode_views(source, patch_maps, views, progress, "images", "patches")
    else:
        source.flips = augment == "flip"
    source.precision = precision  # not of patch maps, which other models may read
    return source


@torch.no_grad()
def encode_views(
    source: ImageSource,
    encode: Callable[..., Tensor],
    views: int = 1,
    progress: Progress = no_progress,
    description: str = "image features",
    kept: str = "",
) -> Tensor:
    """What `encode`, (inputs, patches) -> (B, ...), computes of all images in order, in one pass over them: (V, n, ...)
    on the CPU, of so many stored views; or of the images and, for two, their mirror images. `kept`: what is computed,
    if it depends on the frozen image tower alone; `per_image` may know it already."""
    device, patches = source.model.device, source.patches

    def batches(rows: Sequence[int]) -> Iterator[Tensor]:
        part = source.of(rows)
        if part.views is not None:
            read: Iterable[Any] = zip(*(view.split(VIEW_BATCH) for view in part.views[:views]), strict=True)
        else:
            read = ((x, x.flip(-1)) if views == 2 else (x,) for x, _ in part.batches(VIEW_BATCH))
        for shown in by_image(progress, read, description, len(rows)):
            with autocast(device, source.precision):
                found = [encode(x.to(device), patches=patches).cpu() for x in shown]
            yield torch.stack(found)

    if not kept:
        return torch.cat(list(batches(range(len(source.items)))), 1)
    views = views if source.views is None else min(views, len(source.views))

    def setting() -> str:
        return tower_setting(source.model, kept, source.precision)

    return per_image([item.path for item in source.items], setting, views, batches)
