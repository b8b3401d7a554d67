"""Which photographs were taken together, by their features and facts."""

from collections.abc import Sequence

import numpy as np

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item
from dcp_zoo.data.groups import find_groups
from dcp_zoo.features import AUTO
from dcp_zoo.features.cache import users_cache
from dcp_zoo.features.device import pick_precision
from dcp_zoo.features.extract import FeatureExtractor, plain_reading
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.subjects import in_subjects
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import PLAIN, Views
from dcp_zoo.progress import Progress, no_progress
from dcp_zoo.zoo.build import plain_clip


def comparable(
    items: Sequence[Item], clip: FrozenCLIP, progress: Progress = no_progress, keep: bool = True
) -> FeatureTable:
    """The features that images are compared by: those of a CLIP but for intermediate ones, and the
    images' facts. An image that cannot be read is an error in the table. With `keep` they are kept, see
    `users_cache`."""
    reading = plain_reading(clip).only(len(clip.joined_widths))
    extract = FeatureExtractor(clip, pick_precision(AUTO, clip.architecture, clip.device), progress)
    with users_cache(keep):
        return extract(Photos(items), [reading], facts=True, keep_errors=True)


def groups_in(images: Sequence[ImageLoader], views: Views = (PLAIN,)) -> list[list[int]]:
    """The groups of all these images, one after the other, see `find_groups`. Other `views` are
    computed in the same pass, where they are needed later."""
    tables = [loader.table(views=views, facts=True) for loader in images]
    embeddings = np.concatenate([table.first_parts(1).rows()[0].numpy() for table in tables])
    facts = np.concatenate([table.facts.numpy() for table in tables if table.facts is not None])
    return find_groups(embeddings, facts)


def grouped_in(images: ImageLoader, views: Views = (PLAIN,)) -> list[Item]:
    """The images with their groups, or subjects, see `groups_in` and `in_subjects`."""
    return in_subjects(images.items, lambda: groups_in([images], views), images.table)


def with_own_groups(items: Sequence[Item], keep: bool = True) -> list[Item]:
    """The user's own images with their groups, or subjects, by the miniature's features, which are kept, see
    `users_cache`."""
    images = ImageLoader(Photos(items, facts={}), FeatureExtractor(plain_clip("dcp_mini")))
    with users_cache(keep):
        return grouped_in(images)
