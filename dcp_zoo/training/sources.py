"""The images that a model reads: decoded once, transformed, shuffled, and run through a frozen stem only once."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from dcp_zoo.backbone.clip import Encoder, FrozenCLIP, Reading, joined, parts_of
from dcp_zoo.backbone.inputs import VIEW_BATCH, Features, Inputs, Pixels, Tokens
from dcp_zoo.data import Item
from dcp_zoo.data.groups import find_groups, group_ids, grouped, numbers
from dcp_zoo.data.images import Facts, Progress, by_image, in_threads, load_image, load_with_facts, no_progress
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.heads.head import Head
from dcp_zoo.training.cache import (
    ALL_PARTS,
    ONE_READING,
    computed_by,
    features_folder,
    kept_features,
    per_image,
    tower_setting,
)
from dcp_zoo.training.device import autocast
from dcp_zoo.training.recipes import batch_sizes
from dcp_zoo.zoo.build import plain_clip
from dcp_zoo.zoo.factory import create_transform

Batch = tuple[Any, ...]  # inputs and labels of a batch, and its targets if there are any
CPU = torch.device("cpu")
CACHE_BYTES = 2**30  # decoded images of one dataset are cached up to this size
AT_ONCE = 64  # images that are decoded in advance
KnownFacts = dict[str, Facts]  # by the key of the item
TOKEN_BYTES = 2**30  # tokens of a hybrid CLIP are cached up to this size


class Decoded(dict[int, Image.Image | Tensor]):
    """Decoded images by position, up to so many bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def add(self, index: int, image: Image.Image | Tensor) -> None:
        size = image.nbytes if isinstance(image, Tensor) else 3 * image.width * image.height
        if size <= self.room and index not in self:
            self.room -= size
            self[index] = image


class ImageDataset(Dataset[Any]):
    """Items as (transform(image), label) pairs, for a torch DataLoader: decoded once, on all cores, and kept up to
    `cache_bytes`; then transformed, for torchvision's v2 as a uint8 tensor (3, H, W). `facts` receives those of
    each image that this process decodes. ZooError as of `load_image`."""

    _seeds: Sequence[int] | None = None
    _mirrored: Sequence[int] | None = None
    _targets: Tensor | None = None

    def __init__(
        self,
        items: Sequence[Item],
        transform: Callable[..., Tensor],
        cache_bytes: int = CACHE_BYTES,
        facts: KnownFacts | None = None,
    ) -> None:
        from torchvision.transforms import v2  # slow to import

        self.items, self.transform, self.facts = items, transform, facts
        self._tensors = isinstance(transform, v2.Transform)
        self._decoded = Decoded(cache_bytes)

    def drawn(self, seeds: Sequence[int] | None, mirrored: Sequence[int], targets: Tensor | None) -> "ImageDataset":
        """The same items, decoded once for both, of which those that are `mirrored` are so after the transform. With
        `seeds`, one per item, the result depends neither on the images read before nor on the process that reads it;
        with `targets` (n, ..), these follow the labels."""
        other = copy.copy(self)
        other._seeds, other._mirrored, other._targets = seeds, mirrored, targets
        return other

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """A batch, called by DataLoader. Only decoding is parallel: random transforms keep their order."""
        images = self.read([index for index in indices if index not in self._decoded])
        return [self._transformed(images[i] if i in images else self._decoded[i], i) for i in indices]

    def read(self, indices: Sequence[int]) -> dict[int, Image.Image | Tensor]:
        """Decoded images by position, which are kept where there is room."""
        read = map if get_worker_info() else in_threads  # a worker process of DataLoader has its own core
        images = dict(zip(indices, read(self._load, indices), strict=True))
        for index, image in images.items():
            self._decoded.add(index, image)
        return images

    def _load(self, index: int) -> Image.Image | Tensor:
        item = self.items[index]
        if self.facts is None:
            image = load_image(item.path)
        else:
            image, self.facts[item.key] = load_with_facts(item.path)
        return pil_to_tensor(image) if self._tensors else image

    def _transformed(self, image: Image.Image | Tensor, index: int) -> Batch:
        with nullcontext() if self._seeds is None else seeded(self._seeds[index]):
            x = self.transform(image)
        x = x.flip(-1) if self._mirrored and self._mirrored[index] else x
        return x, self.items[index].label, *([] if self._targets is None else [self._targets[index]])


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """A context in which Python, NumPy and torch, here and on this device, draw from this seed; then as before."""
    accelerator = None if device.type == "cpu" else getattr(torch, device.type, None)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before_there = accelerator and accelerator.get_rng_state(device)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if accelerator:  # `manual_seed` is for the current GPU, which may be another; there is one "mps" only
        with accelerator.device(device) if hasattr(accelerator, "device") else nullcontext():
            accelerator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if accelerator:
            accelerator.set_rng_state(before_there, device)


@dataclass
class ImageSource:
    """The images of a list of items, ready for a CLIP; `batches` can be called again while others are in use.

    Attributes:
        clip: whose preprocessing they get, and whose plain features `features` are.
        items: the items to read.
        views: read instead of images, if set: (views, n, ...) of the kind that `form` makes of a part of them. View 0
            is the test transform's, view 1 its mirror image.
        form: what batches are: pixels; or stored `Tokens` that enter a block, or `Features`.
        flips: whether shuffled batches mirror each image with probability 0.5, if there are no `views`.
        crops: whether the transform crops at random, so that an image is never the same twice.
        once: whether the images are read only once, so that decoded ones need not be kept.
        precision: in which features are computed; they are kept in float32.
        facts: receives those of `ImageDataset`.
    """

    clip: FrozenCLIP
    items: Sequence[Item]
    transform: Callable[..., Tensor]
    views: Tensor | None = None
    form: Callable[[Tensor], Inputs] = Pixels
    workers: int = 0
    flips: bool = False
    crops: bool = False
    once: bool = False
    precision: str = "float32"
    facts: KnownFacts | None = None
    _read: Tensor | None = field(default=None, init=False)  # see `read`

    @cached_property
    def dataset(self) -> ImageDataset:
        """Shared by all epochs, so that each file is decoded once."""
        return ImageDataset(self.items, self.transform, 0 if self.once else CACHE_BYTES, self.facts)

    def decode(self) -> None:
        """Decode all images once before any is needed, so that an error comes early, and their hashes are known."""
        positions = range(len(self.items) if self.views is None else 0)
        for start in positions[::AT_ONCE]:
            self.dataset.read(positions[start : start + AT_ONCE])

    def of(self, rows: Sequence[int]) -> "ImageSource":
        """The images at these positions."""
        if len(rows) == len(self.items):
            return self
        views = None if self.views is None else self.views[:, list(rows)]
        part = replace(self, items=[self.items[i] for i in rows], views=views)
        part._read = None if self._read is None else self._read[:, list(rows)]
        return part

    @property
    def has_features(self) -> bool:
        """Whether features are given, and no images."""
        return self.form is Features

    @property
    def num_views(self) -> int:
        return len(self.views) if self.views is not None else 1 + self.flips

    @property
    def labels(self) -> Tensor:
        return torch.tensor([item.label for item in self.items])

    @property
    def groups(self) -> Tensor:
        """Of images that were taken together (n,), see `group_ids`."""
        return group_ids([item.group for item in self.items])

    @property
    def num_classes(self) -> int:
        """Classes that have images here."""
        return len({item.label for item in self.items})

    def features(self, views: int | None = None, progress: Progress = no_progress) -> Tensor:
        """CLIP's embeddings (V, n, E) of all images in order by the plain CLIP, normalised, in float32 on the CPU.
        `views`: 1 for view 0, 2 for its mirror image as well; by default all that `batches` show."""
        return self.read(views, progress)[..., : self.clip.num_features]

    def read(self, views: int | None = None, progress: Progress = no_progress) -> Tensor:
        """All that the plain CLIP says of the images (V, n, E + V'), see `FrozenCLIP.read`; computed once, unless each
        pass crops anew. Given features stay as they are."""
        if self.views is not None and self.has_features:
            return self.views[:views].float()
        count = views or self.num_views
        count = count if self.views is None else min(count, len(self.views))
        if self._read is not None and len(self._read) >= count:
            return self._read[:count]
        kept = "" if self.crops else ALL_PARTS
        features = encode_views(self, self.clip.read, count, progress, kept=kept).float()
        if not self.crops:
            self._read = features
        return features

    def read_by(self, reading: Reading, views: int | None = None, progress: Progress = no_progress) -> Tensor:
        """The parts of a reading (V, n, ..), normalised, as of `features`. ZooError if features of the plain CLIP are
        given in place of images, and the reading is of something else."""
        if reading.encoder is self.clip and reading.prompts is None:
            return self.read(views, progress)[..., : sum(reading.widths)]
        if self.has_features:
            raise ZooError("Features do not fit: this model reads images alone, not only what plain CLIP says of them.")
        if isinstance(reading.encoder, FrozenCLIP):
            return encode_views(self, reading.encode, views or self.num_views, progress).float()
        pixels = replace(self, views=None, form=Pixels)  # which another encoder reads anew
        kept = "" if self.crops else ONE_READING
        return encode_views(pixels, reading.encode, views or self.num_views, progress, kept=kept, of=reading.encoder)

    def batches(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        first: int = 0,
        drop_last: bool = True,
        targets: Tensor | None = None,
    ) -> Iterable[Batch]:
        """(inputs, labels) batches: in order, or with a generator shuffled, augmented and of the `batch_sizes`; with
        `targets` (views, n, ..) then (inputs, labels, targets), those of the view that is shown, or of view 0 if images
        are cropped anew in every epoch. Random draws depend only on the generator, for crops without one on torch's
        random state, not on the number of workers or the `first` batch read."""
        n, shuffle = len(self.items), generator is not None
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        sizes = batch_sizes(n, batch_size, drop_last)
        draws = (shuffle or self.crops) and self.views is None
        seeds = torch.randint(2**32, (n,), generator=generator).tolist() if draws else None
        view = torch.randint(self.num_views, (n,), generator=generator) if shuffle else torch.zeros(n, dtype=torch.long)
        if self.views is None:
            of_view = None if targets is None else targets[view, torch.arange(n)]
            dataset: Dataset[Any] = self.dataset.drawn(seeds, view.tolist(), of_view)
        else:  # the views of all images one after the other, read in place
            order, of_views = n * view[order] + order, [self.views, *([] if targets is None else [targets])]
            rows, *further = (part[: len(self.views)].flatten(0, 1) for part in of_views)
            dataset = TensorDataset(rows, self.labels.repeat(len(self.views)), *further)
        chunks = order[: sum(sizes)].split(sizes) if shuffle else order.split(batch_size)
        batches = [batch.tolist() for batch in chunks]
        workers = self.workers if self.views is None else 0
        # without a generator DataLoader would draw from torch's global state; workers end with the epoch
        settings: Values = {"generator": generator or torch.Generator(), "num_workers": workers}
        pinned, collate = workers > 0 and self.clip.device.type == "cuda", partial(_collated, self.form)
        return DataLoader(dataset, batch_sampler=batches[first:], pin_memory=pinned, collate_fn=collate, **settings)


def _collated(form: Callable[[Tensor], Inputs], samples: list[Any]) -> Batch:
    """Samples (x, label), or (x, label, target) -> a batch (inputs, labels), or (inputs, labels, targets)."""
    x, *others = default_collate(samples)
    return form(x), *others


def image_source(
    clip: FrozenCLIP,
    items: Sequence[Item],
    augment: str = "none",
    workers: int = 0,
    progress: Progress = no_progress,
    once: bool = False,
    precision: str = "float32",
    facts: KnownFacts | None = None,
) -> ImageSource:
    """Images for a CLIP, with their tokens computed once where that saves work. A hybrid CLIP spends most of its time
    in a frozen stem, and without crops an image has at most two views; unless the images are read `once`."""
    crops = augment == "crop-flip"
    transform = create_transform(clip, crops)
    source = ImageSource(clip, items, transform, workers=workers, crops=crops, once=once, facts=facts)
    tower, views = clip.vision_tower_or_none, 2 if augment == "flip" else 1
    stem = tower if tower and tower.has_stem else None
    numbers = stem.num_tokens * stem.width + sum(stem.further.values()) if stem else 0
    if not once and not crops and stem and 4 * numbers * views * len(items) <= TOKEN_BYTES:
        encode = lambda inputs: clip.enter(inputs).packed()  # noqa: E731
        source.views = encode_views(source, encode, views, progress, "images", "tokens")
        source.form = partial(Tokens.unpacked, shape=(stem.num_tokens, stem.width))
    else:
        source.flips = augment == "flip"
    source.precision = precision  # not of tokens, which other models may read
    return source


def groups_in(*sources: ImageSource, progress: Progress = no_progress) -> list[list[int]]:
    """The groups of all images of some sources, one after the other, see `find_groups`. Their `numbers` are read if
    they are not known, and kept as features are."""
    features = torch.cat([source.features(None, progress)[0] for source in sources]).numpy()
    items, known = [item for source in sources for item in source.items], sources[0].facts or {}  # by now filled

    def rows(positions: Sequence[int]) -> Iterator[Tensor]:
        for start in range(0, len(positions), AT_ONCE):
            part = [items[i] for i in positions[start : start + AT_ONCE]]
            read = in_threads(lambda item: known.get(item.key) or load_with_facts(item.path)[1], part)
            yield torch.from_numpy(np.stack([numbers(facts) for facts in read]))[None]

    facts = per_image([item.path for item in items], lambda: f"facts {computed_by()}", 1, rows)[0].numpy()
    return find_groups(features, facts)


def with_own_groups(items: Sequence[Item]) -> list[Item]:
    """The user's own images with their groups, by the miniature's features, which are kept in the user's cache."""
    source = image_source(plain_clip("dcp_mini"), items, once=True, facts={})
    with kept_features(features_folder()):
        return grouped(items, lambda: groups_in(source))


def features_of(head: Head, source: ImageSource, views: int | None = None, progress: Progress = no_progress) -> Tensor:
    """The normalised features (V, n, F) that a head's classifier reads of images, see `ImageSource.features`."""
    reads = head.reads
    return joined([source.read_by(reading, views, progress) for reading in reads], parts_of(reads))


@torch.no_grad()
def encode_views(
    source: ImageSource,
    encode: Callable[..., Tensor],
    views: int = 1,
    progress: Progress = no_progress,
    description: str = "image features",
    kept: str = "",
    of: Encoder | None = None,
) -> Tensor:
    """What `encode`, inputs -> (B, ...), computes of all images in order, in one pass over them: (V, n, ...)
    on the CPU, of so many stored views; or of the images and, for two, their mirror images. `kept`: what is computed,
    if it depends on the frozen encoder alone, `of` CLIP by default; `per_image` may know it already."""
    device, form = source.clip.device, source.form

    def batches(rows: Sequence[int]) -> Iterator[Tensor]:
        part = source.of(rows)
        if part.views is not None:
            read: Iterable[tuple[Tensor, ...]] = zip(
                *(view.split(VIEW_BATCH) for view in part.views[:views]), strict=True
            )
        else:
            pixels = (inputs.x for inputs, _ in part.batches(VIEW_BATCH))
            read = ((x, x.flip(-1)) if views == 2 else (x,) for x in pixels)
        for shown in by_image(progress, read, description, len(source.items), len(source.items) - len(rows)):
            with autocast(device, source.precision):
                encoded = [encode(form(x.to(device))).cpu() for x in shown]
            yield torch.stack(encoded)

    if not kept:
        return torch.cat(list(batches(range(len(source.items)))), 1)
    setting = partial(tower_setting, of or source.clip, kept, source.precision)
    return per_image([item.path for item in source.items], setting, views, batches)
