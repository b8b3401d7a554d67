"""The one loop over frozen towers: from photographs to a table of features."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.backbone._torch import seeded
from dcp_zoo.backbone.clip import FrozenCLIP, Reading
from dcp_zoo.backbone.inputs import VIEW_BATCH, Inputs
from dcp_zoo.data.groups import FACTS, numbers
from dcp_zoo.data.images import crop
from dcp_zoo.errors import UnreadableImages, ZooError, shorten
from dcp_zoo.features.cache import active_cache, computed_by, tower_setting
from dcp_zoo.features.device import autocast
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import MIRRORED, PLAIN, View, Views
from dcp_zoo.progress import Progress, by_image, no_progress
from dcp_zoo.zoo.factory import create_transform

Shown = dict[View, Any]  # a batch of images in each view, as an encoder reads them
KnownInputs = Callable[[View, Sequence[int]], Inputs]  # of the images at these positions
Batch = tuple[Sequence[int], dict[int, ZooError], Shown]  # positions, why some cannot be read, and those that can


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
        columns = [self._columns(reading, views, photos) for reading in readings]
        missing = set[int]()
        for of_reading in columns:
            missing = missing.union(*(column.missing for column in of_reading.values()))
        of_facts = None
        if facts:
            of_facts = Column(photos, FACTS, f"facts and frames {computed_by()}")
            missing |= of_facts.missing
            if photos.facts is None:
                photos.facts = {}  # filled while images are decoded
        errors: dict[int, ZooError] = {}
        if missing:
            batches = self._batches(photos, sorted(missing), views, inputs)
            done = len(photos) - len(missing)
            for positions, problems, shown in by_image(self.progress, batches, "image features", len(photos), done):
                if problems and not keep_errors:
                    raise UnreadableImages(shorten([str(problem) for problem in problems.values()]))
                errors |= problems
                readable = [i for i in positions if i not in problems]
                if not readable:
                    continue
                self._encode(columns, readable, shown)
                if of_facts and of_facts.missing:
                    rows = [numbers(photos.facts_of(i)) for i in readable]
                    of_facts.add(readable, torch.from_numpy(np.stack(rows)))
        widths = [reading.widths for reading in readings]
        features = {}
        for view in views:
            wanted = []
            for of_reading, parts in zip(columns, widths, strict=True):
                wanted.append(of_reading[view].rows[:, : sum(parts)])
            features[view] = torch.cat(wanted, 1)
        return FeatureTable(photos.items, features, widths, of_facts.rows if of_facts else None, errors)

    def _columns(self, reading: Reading, views: Views, photos: Photos) -> dict[View, "Column"]:
        """Empty columns by view, or what is kept of them. Kept are features of frozen encoders, and of the
        plain CLIP all of them, as other heads may read more; not those of a CLIP that a method changed, nor
        of random crops, which nobody asks for again."""
        if is_plain_reading(reading, self.clip):
            reading = plain_reading(self.clip)
        is_frozen = reading.encoder is self.clip or not isinstance(reading.encoder, FrozenCLIP)
        has_fixed_views = any(view.seed is None for view in views)
        tower = ""
        if has_fixed_views and is_frozen and reading.prompts is None and active_cache.get() is not None:
            tower = tower_setting(reading.encoder, self.precision)  # waits for the device, once for all views
        columns = {}
        for view in views:
            is_kept = tower and view.seed is None
            setting = f"{view.name} {[*reading.parts]} {tower}" if is_kept else ""
            columns[view] = Column(photos, sum(reading.widths), setting, reading)
        return columns

    def _encode(self, columns: Sequence[Mapping[View, "Column"]], positions: Sequence[int], shown: Shown) -> None:
        """Compute what is missing of these images, which are shown in each view."""
        for view, images in shown.items():
            pending = [of_reading[view] for of_reading in columns if of_reading[view].missing]
            of_clip = [column for column in pending if column.reading.encoder is self.clip]
            is_shared = len(of_clip) > 1 and self.clip.vision_tower_or_none is not None
            with autocast(self.clip.device, self.precision):
                entered = self.clip.enter(images) if is_shared else images  # the stem is computed once
                for column in pending:
                    features = column.reading.encode(entered if column in of_clip else images)
                    column.add(positions, features.float().cpu())

    def _batches(
        self, photos: Photos, positions: Sequence[int], views: Views, inputs: KnownInputs | None
    ) -> Iterator[Batch]:
        """Batches of the images at these positions, on the device: normalised (B, 3, H, W), or `inputs`."""
        if inputs is not None:
            for start in range(0, len(positions), self.batch_size):
                batch = positions[start : start + self.batch_size]
                yield batch, {}, {view: inputs(view, batch).to(self.clip.device) for view in views}
            return
        has_crops = any(view.seed is not None for view in views)
        read = photos.load if has_crops else partial(photos.pixels, preprocessing=self.clip.pretrained_cfg)
        for batch, results in photos.batches(positions, self.batch_size, read):
            problems: dict[int, ZooError] = {}
            images: dict[int, Any] = {}
            for i, result in zip(batch, results, strict=True):
                if isinstance(result, ZooError):
                    problems[i] = result
                else:
                    images[i] = result
            yield batch, problems, self._in_views(images, photos, views) if images else {}

    def _in_views(self, images: Mapping[int, Any], photos: Photos, views: Views) -> Shown:
        """Pixels, or for crops decoded images, by position -> what the encoder reads in each view."""
        preprocessing = self.clip.pretrained_cfg
        whole = [image if isinstance(image, np.ndarray) else crop(image, preprocessing) for image in images.values()]
        plain = self.normalised(torch.from_numpy(np.stack(whole)))
        shown: Shown = {}
        for view in views:
            if view == PLAIN:
                shown[view] = plain
            elif view == MIRRORED:
                shown[view] = plain.flip(-1)
            elif view.seed is not None:
                shown[view] = self._crops(images, photos, view)
            else:
                raise ValueError(f"No images are made for the view {view}.")
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


@dataclass(eq=False)
class Column:
    """Features of one reading of n images in one view: rows (n, width), NaN where an image is `missing`.

    Args:
        photos: the images.
        width: of a row.
        setting: what the rows depend on besides the image; "" if they must not be kept.
        reading: what is computed; None for facts.
    """

    photos: Photos
    width: int
    setting: str
    reading: Any = None

    def __post_init__(self) -> None:
        self.rows = torch.full((len(self.photos), self.width), torch.nan)
        self.missing = set(range(len(self.photos)))
        self._cache = active_cache.get() if self.setting else None
        if self._cache is not None:
            found = self._cache.get(self.setting, self.photos.keys)
            known = [i for i, key in enumerate(self.photos.keys) if key in found]
            if known:
                self.rows[known] = torch.stack([found[self.photos.keys[i]] for i in known])
                self.missing -= set(known)

    def add(self, positions: Sequence[int], rows: Tensor) -> None:
        """The rows of images at these positions."""
        self.rows[positions] = rows
        self.missing -= set(positions)
        if self._cache is not None:
            keys = [self.photos.keys[i] for i in positions]
            self._cache.put(self.setting, dict(zip(keys, rows, strict=True)))
