"""Which photographs were taken together, by their features and facts."""

from collections.abc import Sequence

import numpy as np

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item
from dcp_zoo.data.groups import find_groups, with_groups
from dcp_zoo.features import AUTO
from dcp_zoo.features.device import pick_precision
from dcp_zoo.features.extract import FeatureExtractor, plain_reading
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.subjects import with_subjects
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import PLAIN, Views
from dcp_zoo.progress import Progress, no_progress
from dcp_zoo.zoo.build import plain_clip


def comparable(items: Sequence[Item], clip: FrozenCLIP, progress: Progress = no_progress) -> FeatureTable:
    """The features that images are compared by: those of a CLIP but for intermediate ones, and the
    images' facts. An image that cannot be read is an error in the table."""
    reading = plain_reading(clip).only(len(clip.joined_widths))
    extract = FeatureExtractor(clip, pick_precision(AUTO, clip.architecture, clip.device), progress)
    return extract(Photos(items), [reading], facts=True, keep_errors=True)


def group_images(images: Sequence[ImageLoader], views: Views = (PLAIN,), subjects: bool = False) -> list[Item]:
    """All these images, one after the other, with the groups that they were given or, if none has one,
    those that are found, see `find_groups`; with `subjects` by what they show, too, see
    `with_subjects`. Other `views` are computed in the same pass, where they are needed later."""
    items = [item for loader in images for item in loader.items]
    if any(item.group for item in items):
        return items
    tables = [loader.table(views=views, facts=True).first_parts(1) for loader in images]
    embeddings = np.concatenate([table.rows()[0].numpy() for table in tables])
    facts = np.concatenate([table.facts.numpy() for table in tables if table.facts is not None])
    grouped = with_groups(items, find_groups(embeddings, facts))
    return with_subjects(grouped, embeddings) if subjects else grouped


def group_own_images(items: Sequence[Item]) -> list[Item]:
    """The user's own images with their groups, or subjects, by the miniature's features."""
    images = ImageLoader(Photos(items, facts={}), FeatureExtractor(plain_clip("dcp_mini")))
    return group_images([images], subjects=True)
