"""The one loop over frozen towers: from photographs to a table of features."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.backbone._torch import seeded
from dcp_zoo.backbone.clip import FrozenCLIP, Reading
from dcp_zoo.backbone.inputs import VIEW_BATCH, Inputs
from dcp_zoo.data.images import NUMBERS, crop, in_batches
from dcp_zoo.errors import UnreadableImages, ZooError, shorten
from dcp_zoo.features.cache import active_cache, computed_by
from dcp_zoo.features.device import autocast
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import MIRRORED, PLAIN, View, Views
from dcp_zoo.progress import Progress, by_image, no_progress
from dcp_zoo.zoo.factory import create_transform

Shown = dict[View, Any]  # a batch of images in each view, as an encoder reads them
KnownInputs = Callable[[View, Sequence[int]], Inputs]  # of the images at these positions


def plain_reading(clip: FrozenCLIP) -> Reading:
    """All features that a CLIP computes of images, without prompts."""
    return Reading(clip, clip.parts, clip.read)


def is_plain_reading(reading: Reading, clip: FrozenCLIP) -> bool:
    """Whether these are features that this CLIP computes without prompts: all, or the first ones."""
    first = [*clip.parts][: len(reading.parts)]
    return reading.encoder is clip and reading.prompts is None and [*reading.parts] == first


@dataclass
class FeatureExtractor:
    """Computes features of photographs by a frozen CLIP, by what a method made of it, and by encoders
    beside it.

    How an image becomes a row: `_read` decodes it and shows it in each view, `_encode` computes the readings
    of a view, and `CachedRows` has the rows of one reading in one view, those that were kept and those that are
    computed now.

    Args:
        clip: the plain CLIP, on its device, whose preprocessing images get.
        precision: in which features are computed; they are kept in float32.
        progress: shows the progress of a pass.
        batch_size: images per forward pass.
    """

    clip: FrozenCLIP
    precision: str = "float32"
    progress: Progress = no_progress
    batch_size: int = VIEW_BATCH

    @torch.no_grad()
    def __call__(
        self,
        photos: Photos,
        readings: Sequence[Reading] = (),
        views: Views = (PLAIN,),
        *,
        inputs: KnownInputs | None = None,
        facts: bool = False,
        keep_errors: bool = False,
    ) -> FeatureTable:
        """A table of features. An image is decoded once, and only if something of it is not kept, see
        `kept_features`. ZooError for an image that cannot be read.

        Args:
            photos: the images.
            readings: which features. Default: all of the plain CLIP.
            views: of each image.
            inputs: what the encoder reads of some images in a view, if that is known. Default: their pixels.
            facts: whether the table has the facts of images, too.
            keep_errors: whether an image that cannot be read is an error in the table, and not raised.
        """
        readings = readings or [plain_reading(self.clip)]
        columns: dict[View, list[CachedRows]] = {}
        for view in views:
            columns[view] = [self._cached(photos, view, reading) for reading in readings]
        of_facts = CachedRows(photos, f"facts and frames {computed_by()}") if facts else None
        if facts and photos.facts is None:
            photos.facts = {}  # filled while images are decoded
        missing = set[int]()
        for column in chain(*columns.values(), [of_facts] if of_facts else []):
            missing |= column.missing
        errors: dict[int, ZooError] = {}
        if missing:
            batches = self._read(photos, sorted(missing), views, inputs)
            done = len(photos) - len(missing)
            for positions, problems, shown in by_image(self.progress, batches, "image features", len(photos), done):
                if problems and not keep_errors:
                    raise UnreadableImages(shorten([str(problem) for problem in problems.values()]))
                errors |= problems
                readable = [i for i in positions if i not in problems]
                if not readable:
                    continue
                for view, images in shown.items():
                    self._encode(columns[view], readable, images)
                if of_facts and of_facts.missing:
                    rows = [photos.facts_of(i).numbers for i in readable]
                    of_facts.add(readable, torch.from_numpy(np.stack(rows)))
        widths = [reading.widths for reading in readings]
        features = {}
        for view, of_view in columns.items():
            asked = [column.rows[:, : sum(parts)] for column, parts in zip(of_view, widths, strict=True)]
            features[view] = torch.cat(asked, 1)
        return FeatureTable(photos.items, features, widths, of_facts.rows if of_facts else None, errors)

    def _cached(self, photos: Photos, view: View, reading: Reading) -> "CachedRows":
        """A column for a reading in a view. Kept are features of frozen encoders, and of the plain CLIP all of
        them, as other heads may read more; not those of a CLIP that a method changed, nor of random crops, which
        nobody asks for again."""
        encoder = reading.encoder
        if is_plain_reading(reading, self.clip):
            reading = plain_reading(self.clip)
        is_changed = isinstance(encoder, FrozenCLIP) and encoder is not self.clip
        setting = ""
        if not (is_changed or reading.prompts or view.seed is not None or active_cache.get() is None):
            tower = f"{encoder.identity()} {encoder.device.type} {encoder.preprocessing}"  # waits for the device
            setting = f"{view.name} {[*reading.parts]} {self.precision} {tower} {computed_by()}"
        return CachedRows(photos, setting, reading)

    def _read(
        self, photos: Photos, positions: Sequence[int], views: Views, inputs: KnownInputs | None
    ) -> Iterator[tuple[Sequence[int], dict[int, ZooError], Shown]]:
        """Batches of positions, why some of the images cannot be read, and the others in each view, on the
        device: normalised (B, 3, H, W), or `inputs`."""
        if inputs is not None:
            for start in range(0, len(positions), self.batch_size):
                batch = positions[start : start + self.batch_size]
                yield batch, {}, {view: inputs(view, batch).to(self.clip.device) for view in views}
            return
        has_crops = any(view.seed is not None for view in views)
        read = photos.load if has_crops else partial(photos.pixels, preprocessing=self.clip.pretrained_cfg)
        for batch, results in in_batches(read, positions, self.batch_size):
            found = dict(zip(batch, results, strict=True))
            problems = {i: result for i, result in found.items() if isinstance(result, ZooError)}
            images = {i: result for i, result in found.items() if i not in problems}
            yield batch, problems, self._in_views(images, photos, views) if images else {}

    def _in_views(self, images: Mapping[int, Any], photos: Photos, views: Views) -> Shown:
        """Pixels, or for crops decoded images, by position -> what the encoder reads in each view."""
        preprocessing = self.clip.pretrained_cfg
        whole = [image if isinstance(image, np.ndarray) else crop(image, preprocessing) for image in images.values()]
        plain = self.normalised(torch.from_numpy(np.stack(whole)))
        shown: Shown = {}
        for view in views:
            if view.seed is not None:
                shown[view] = self._crops(images, photos, view)
            else:
                shown[view] = {PLAIN: plain, MIRRORED: plain.flip(-1)}[view]
        return shown

    def _crops(self, images: Mapping[int, Any], photos: Photos, view: View) -> Tensor:
        """A random crop of each image, which depends on its key and the view's seed alone."""
        transform = create_transform(self.clip, is_training=True)
        crops = []
        for i, image in images.items():
            with seeded(view.seed_of(photos.items[i].key)):
                crops.append(transform(image))
        return torch.stack(crops).to(self.clip.device)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the images on the device, as `create_transform` makes them."""
        cfg = self.clip.pretrained_cfg
        device = self.clip.device
        mean = torch.tensor(cfg["mean"], device=device)[:, None, None]
        std = torch.tensor(cfg["std"], device=device)[:, None, None]
        return (pixels.to(device) / 255 - mean) / std

    def _encode(self, columns: Sequence["CachedRows"], positions: Sequence[int], images: Any) -> None:
        """Compute what is missing of images, which are shown in one view, in its columns."""
        pending = [column for column in columns if column.missing]
        of_clip = [column for column in pending if column.reading.encoder is self.clip]
        is_shared = len(of_clip) > 1 and self.clip.vision_tower_or_none is not None
        with autocast(self.clip.device, self.precision):
            entered = self.clip.enter(images) if is_shared else images  # the stem is computed once
            for column in pending:
                features = column.reading.encode(entered if column in of_clip else images)
                column.add(positions, features.float().cpu())


@dataclass(eq=False)
class CachedRows:
    """Features of one reading of n images in one view: rows (n, width), NaN where an image is `missing`.

    Args:
        photos: the images.
        setting: what the rows depend on besides the image; "" if they must not be kept.
        reading: what is computed; None for facts.
    """

    photos: Photos
    setting: str
    reading: Any = None

    def __post_init__(self) -> None:
        width = sum(self.reading.widths) if self.reading else NUMBERS
        self.rows = torch.full((len(self.photos), width), torch.nan)
        self.missing = set(range(len(self.photos)))
        self._cache = active_cache.get() if self.setting else None
        if self._cache is not None:
            found = self._cache.get(self.setting, self.photos.keys)
            for i, key in enumerate(self.photos.keys):
                if key in found:
                    self.rows[i] = found[key]
                    self.missing.remove(i)

    def add(self, positions: Sequence[int], rows: Tensor) -> None:
        """The rows of images at these positions."""
        self.rows[positions] = rows
        self.missing -= set(positions)
        if self._cache is not None:
            keys = [self.photos.keys[i] for i in positions]
            self._cache.put(self.setting, dict(zip(keys, rows, strict=True)))
