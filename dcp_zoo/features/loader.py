"""Batches of images for training: of photographs that are decoded once, of their tokens after a frozen
stem, or of their features."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dcp_zoo.backbone._torch import seeded
from dcp_zoo.backbone.clip import FrozenCLIP, Reading
from dcp_zoo.backbone.inputs import Features, Inputs, Pixels, Tokens
from dcp_zoo.data import Item, in_threads
from dcp_zoo.errors import ZooError
from dcp_zoo.features import MANY
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.table import FeatureTable, LabelledItems
from dcp_zoo.features.views import MIRRORED, PLAIN, View, Views
from dcp_zoo.zoo.factory import create_transform

Batch = tuple[Any, ...]  # inputs and labels of a batch, and its targets if there are any
TOKEN_BYTES = 2**30  # tokens of a hybrid CLIP are kept up to this size


@dataclass
class ImageLoader(LabelledItems):
    """The training images of a method, as photographs, or as what is known of them already: features,
    or tokens after a frozen stem.

    Args:
        photos: the images.
        extract: computes features of them; its CLIP's preprocessing is used. None where only
            `precomputed` features are.
        augment: "none", "flip" or "crop-flip": how images are shown in training.
        workers: processes that decode for training; 0 decodes with threads of this one.
        part_of: of how many images these are a part. Default: of none.
        precomputed: features or tokens that batches have in place of pixels.
        form: the kind of `Inputs` that a batch is.
    """

    photos: Photos
    extract: FeatureExtractor | None
    augment: str = "none"
    workers: int = 0
    part_of: int | None = None
    precomputed: FeatureTable | None = None
    form: Callable[[Tensor], Inputs] = Pixels

    @classmethod
    def of_features(cls, known: FeatureTable, augment: str = "none") -> "ImageLoader":
        """Images of which only features are known."""
        return cls(Photos(known.items), None, augment, precomputed=known, form=Features)

    @property
    def items(self) -> Sequence[Item]:  # type: ignore[override]
        return self.photos.items

    @property
    def crops(self) -> bool:
        """Whether each epoch shows other crops."""
        return self.augment == "crop-flip"

    @property
    def training_views(self) -> Views:
        """What training shows, unless it draws crops."""
        return (PLAIN, MIRRORED) if self.augment == "flip" else (PLAIN,)

    @property
    def total(self) -> int:
        """The number of these images, or of those that they are a part of. Whatever depends on the
        number of training images depends on this one, so that heads of folds are trained as that of all
        images."""
        return self.part_of or len(self)

    @property
    def with_flips(self) -> Views:
        """The plain view, and that of mirror images, unless there are many images; of given features,
        all of theirs."""
        if self.extract is None and self.precomputed is not None:
            return tuple(self.precomputed.views)
        return (PLAIN, MIRRORED) if self.total <= MANY else (PLAIN,)

    def with_items(self, items: Sequence[Item]) -> "ImageLoader":
        """The same images with these items, such as with their groups."""
        return replace(self, photos=self.photos.with_items(items))

    def of(self, positions: Sequence[int]) -> "ImageLoader":
        """The images at these positions."""
        known = None if self.precomputed is None else self.precomputed.of(positions)
        return replace(self, photos=self.photos.of(positions), part_of=self.total, precomputed=known)

    def table(self, readings: Sequence[Reading] = (), views: Views = (PLAIN,), *, facts: bool = False) -> FeatureTable:
        """Features of the images, see `FeatureExtractor`: those that are given, or computed, from the
        tokens where that is possible. ZooError for what given features do not say, or a view of which
        they are not given."""
        of_clip = all(isinstance(reading.encoder, FrozenCLIP) for reading in readings)
        known = self.precomputed
        if self.extract is None:
            assert known is not None
            known.rows(*views)  # an error if a view is missing
            if not of_clip or any(reading.prompts for reading in readings):
                raise ZooError("Features do not fit: this model reads images, not only what plain CLIP says of them.")
            return replace(known, items=self.items)
        inputs = None
        if of_clip and known is not None and known.views.keys() >= set(views):
            inputs = self._inputs
        return self.extract(self.photos, readings, views, inputs=inputs, facts=facts)

    def _inputs(self, view: View, positions: Sequence[int]) -> Inputs:
        assert self.precomputed is not None
        return self.form(self.precomputed.views[view][list(positions)])

    def after_stem(self, views: Views) -> "ImageLoader":
        """The same as tokens that are computed once, in these views, where that saves work: a hybrid
        CLIP spends most of its time in a frozen stem, and without crops an image has at most two
        views."""
        assert self.extract is not None
        clip = self.extract.clip
        tower = clip.vision_tower_or_none
        if tower is None or not tower.has_stem or self.crops:
            return self
        width = tower.num_tokens * tower.width + sum(tower.extra.values())
        if 4 * width * len(views) * len(self) > TOKEN_BYTES:
            return self
        stem = Reading(clip, {"tokens": width}, lambda images: clip.enter(images).packed())
        exact = replace(self.extract, precision="float32")  # other models may read them
        unpacked = partial(Tokens.unpacked, shape=(tower.num_tokens, tower.width))
        return replace(self, workers=0, precomputed=exact(self.photos, [stem], views), form=unpacked)

    def shuffled(
        self,
        sizes: Sequence[int],
        generator: torch.Generator,
        *,
        first: int = 0,
        targets: Tensor | None = None,
    ) -> Iterable[Batch]:
        """One epoch of (inputs, labels) batches of these sizes. Draws depend on the generator alone,
        not on the number of workers or the `first` batch that is read.

        Args:
            sizes: of the batches.
            generator: draws the order of the images, their views and crops.
            first: the batch to begin with.
            targets: (V, n, ..) by view: batches are then (inputs, labels, targets of the views that are
                shown).
        """
        n = len(self)
        # every seeded result depends on these draws and their order
        order = torch.randperm(n, generator=generator)
        seeds = None
        if self.precomputed is None:
            seeds = torch.randint(2**32, (n,), generator=generator).tolist()
        shown = torch.randint(len(self.training_views), (n,), generator=generator)
        chunks = order[: sum(sizes)].split(list(sizes))[first:]
        return self._batches(chunks, generator, shown, seeds, targets)

    def in_order(self, size: int) -> Iterable[Batch]:
        """(inputs, labels) batches of the plain images, in order."""
        plain = torch.zeros(len(self), dtype=torch.long)
        return self._batches(torch.arange(len(self)).split(size), torch.Generator(), plain)

    def _batches(
        self,
        chunks: Sequence[Tensor],
        generator: torch.Generator,
        shown: Tensor,
        seeds: Sequence[int] | None = None,
        targets: Tensor | None = None,
    ) -> Iterable[Batch]:
        """Batches of the images at these positions, each image in the view of its index `shown` (n,),
        or cropped by its seed."""
        every = torch.arange(len(self))
        others = [self.labels]
        if targets is not None:
            others.append(targets[shown, every])
        read: Callable[[Sequence[int]], Inputs]
        if self.precomputed is not None:
            rows = self.precomputed.rows(*self.training_views)[shown, every]

            def read(positions: Sequence[int]) -> Inputs:
                return self.form(rows[positions])

        else:
            assert self.extract is not None
            transform = create_transform(self.extract.clip, is_training=self.crops and seeds is not None)
            mirrored = [self.training_views[i] == MIRRORED for i in shown.tolist()]
            read = PhotoReader(self.photos, transform, seeds, mirrored)
        return DataLoader(
            ShownImages(read, others),
            batch_size=None,  # the dataset returns batches
            sampler=[chunk.tolist() for chunk in chunks],
            generator=generator,  # without one it would draw from torch's random state
            num_workers=self.workers,
        )


@dataclass(eq=False)
class ShownImages(Dataset[Any]):
    """Batches (inputs, labels), or (inputs, labels, targets), by lists of positions.

    Args:
        read: what a model reads of the images at some positions.
        others: the labels (n,), and targets (n, ..) if there are any.
    """

    read: Callable[[Sequence[int]], Inputs]
    others: Sequence[Tensor]

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        return self.read(positions), *[each[positions] for each in self.others]


@dataclass(eq=False)
class PhotoReader:
    """Reads photographs as transform(image), by their positions.

    Args:
        photos: the images, decoded once for all readers of them.
        transform: of a decoded image.
        seeds: of each image's random transform, which then depends neither on the images before nor on
            the process.
        is_mirrored: whether each is flipped after the transform.
    """

    photos: Photos
    transform: Callable[..., Tensor]
    seeds: Sequence[int] | None
    is_mirrored: Sequence[bool]

    def __call__(self, positions: Sequence[int]) -> Inputs:
        images = []
        for i, image in zip(positions, in_threads(self.photos.load, positions), strict=True):
            with nullcontext() if self.seeds is None else seeded(self.seeds[i]):
                x = self.transform(image)
            images.append(x.flip(-1) if self.is_mirrored[i] else x)
        return Pixels(torch.stack(images))
