"""Which photographs were taken together, by their features and facts; and whether the images of a class show
a few things or places, each of them several times, on other days, say. No test for copies sees that.

The images of each class are clustered by average linkage of their cosine distances, into as many clusters as
have the largest silhouette (Rousseeuw, Silhouettes: a Graphical Aid, 1987) of those of which none holds more
than half of the images. The sign of few subjects is the mean of these silhouettes over classes: of single
photographs it is small. Clusters are guesses: a head that keeps them together is measured as too poor, rather
than too good.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import pdist, squareform

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item, find_groups, group_ids, with_groups
from dcp_zoo.errors import warn
from dcp_zoo.features import AUTO
from dcp_zoo.features.device import pick_precision
from dcp_zoo.features.extract import FeatureExtractor, plain_reading
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import PLAIN, Views
from dcp_zoo.progress import Progress, no_progress
from dcp_zoo.zoo.build import plain_clip

SUBJECT = "subject "  # begins the name of a group that is a cluster
SIGN = 0.26  # least mean silhouette of many images,
VARIES = 0.45  # and this over the root of their number more, as it varies. See `benchmarks/notes.md`
LEAST, MOST = 4, 200  # images of a class that is looked at


def comparable(items: Sequence[Item], clip: FrozenCLIP, progress: Progress = no_progress) -> FeatureTable:
    """The features that images are compared by: those of a CLIP but for intermediate ones, and the
    images' facts. An image that cannot be read is an error in the table."""
    reading = plain_reading(clip)
    reading = reading.only(len(reading.parts) - reading.inside)
    extract = FeatureExtractor(clip, pick_precision(AUTO, clip.architecture, clip.device), progress)
    return extract(Photos(items), [reading], facts=True, keep_errors=True)


def group_images(images: Sequence[ImageLoader], views: Views = (PLAIN,), subjects: bool = False) -> list[Item]:
    """All these images, one after the other, with the groups that they were given or, if none has one,
    those that are found, see `find_groups`; with `subjects` by what they show, too, see
    `with_subjects`. Other `views` are computed in the same pass, where they are needed later."""
    items = [item for loader in images for item in loader.items]
    if any(item.group for item in items):
        return items
    tables = [loader.table(views=views, facts=True).embeddings for loader in images]
    embeddings = np.concatenate([table.rows()[0].numpy() for table in tables])
    facts = np.concatenate([table.facts.numpy() for table in tables if table.facts is not None])
    grouped = with_groups(items, find_groups(embeddings, facts))
    return with_subjects(grouped, embeddings) if subjects else grouped


def group_own_images(items: Sequence[Item]) -> list[Item]:
    """The user's own images with their groups, or subjects, by the miniature's features."""
    images = ImageLoader(Photos(items, facts={}), FeatureExtractor(plain_clip("dcp_mini")))
    return group_images([images], subjects=True)


def with_subjects(items: list[Item], embeddings: np.ndarray) -> list[Item]:
    """The items, by CLIP's embeddings (n, E); or where they look like few subjects, with these as groups,
    and a warning. A group that was found counts as one image, and stays together."""
    ids = group_ids([item.group for item in items]).numpy()
    first = np.unique(ids, return_index=True)[1]
    first = first[~np.isnan(embeddings[first, 0])]
    labels = np.array([items[i].label for i in first])
    silhouettes = []
    names = dict[int, str]()  # by the group's id
    for label in np.unique(labels):
        own = first[labels == label]
        if LEAST <= len(own) <= MOST:
            silhouette, clusters = clustered(embeddings[own])
            silhouettes.append(silhouette)
            names |= {ids[i]: f"{SUBJECT}{label} {cluster}" for i, cluster in zip(own, clusters, strict=True)}
    if not names or np.mean(silhouettes) < SIGN + VARIES / math.sqrt(len(names)):
        return items
    number = len(set(names.values())) / len(silhouettes)
    warn(
        f"These look like about {number:.0f} subjects in each class, each photographed several times: a head may be "
        "less accurate on others. To know, name the subjects (column `group`, --group-by, in Python groups=)."
    )
    return [item._replace(group=names.get(i, item.group)) for i, item in zip(ids, items, strict=True)]


def looks_few(items: Sequence[Item]) -> bool:
    """Whether their groups are clusters."""
    return any(item.group.startswith(SUBJECT) for item in items)


def clustered(embeddings: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest silhouette, and the cluster of each of n images (n,), of 4 or more."""
    distances = pdist(embeddings, "cosine")
    square = squareform(distances)
    trees = cut_tree(linkage(distances, "average"), range(2, len(embeddings))).T
    found = [(silhouette(square, tree), tree) for tree in trees if 2 * np.bincount(tree).max() <= len(tree)]
    return max(found, key=lambda pair: pair[0])


def silhouette(distances: np.ndarray, clusters: np.ndarray) -> float:
    """The mean silhouette of n images, 0 for one that is alone, by their distances (n, n)."""
    members = np.eye(clusters.max() + 1)[clusters]  # (n, k)
    sizes = members.sum(0)
    rows = np.arange(len(clusters))
    sums = distances @ members
    own = sums[rows, clusters] / np.maximum(sizes[clusters] - 1, 1)
    means = sums / sizes
    means[rows, clusters] = np.inf
    nearest = means.min(1)
    values = (nearest - own) / np.maximum(np.maximum(nearest, own), 1e-12)
    return float(np.where(sizes[clusters] > 1, values, 0).mean())
