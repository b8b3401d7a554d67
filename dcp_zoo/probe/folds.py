"""Folds: which training images are left out together, to see what the others say of them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import WeightAndBias

FOLDS = 4


def folds(labels: Tensor, groups: Tensor | None = None) -> list[Tensor]:
    """The positions of the images of each fold, in order, by labels (n,). There are four folds, or as many
    as the largest class has images: a class's first image is in the first fold, its second in the second,
    and so on.

    Images with the same one of the integers `groups` (n,) are in one fold, by the first of them. Default:
    each image is a group. A group without which a class would have no image is in no fold.

    >>> [out.tolist() for out in folds(torch.tensor([0, 0, 0, 1, 1, 2]))]
    [[0, 3], [1, 4], [2]]
    >>> [out.tolist() for out in folds(torch.tensor([0, 0, 0, 1, 1, 2]), groups=torch.tensor([7, 7, 8, 3, 3, 5]))]
    [[0, 1], [2]]
    """
    n = len(labels)
    counts = torch.bincount(labels)
    positions = torch.arange(n)
    group = (positions if groups is None else groups).unique(return_inverse=True)[1]
    first = torch.full((n,), n).scatter_reduce(0, group, positions, "amin")[group]  # the group's first image
    is_first = first == positions
    position = torch.zeros(n, dtype=torch.long)
    position[is_first] = within_class(labels[is_first])
    number = min(FOLDS, int(position.max()) + 1)
    parts = []
    for fold in range(number):
        out = position[first] % number == fold
        is_last = out & (torch.bincount(labels[out], minlength=len(counts)) == counts)[labels]
        out &= ~torch.isin(group, group[is_last])
        parts.append(positions[out])
    return [part for part in parts if len(part)]


def left_out(
    views: Tensor, labels: Tensor, groups: Tensor, fit: Callable[[Tensor, Tensor], WeightAndBias]
) -> tuple[Tensor, Tensor] | None:
    """The positions (m,) of images that are left out in folds, and their logits (m, C) by the linear
    classifiers that `fit` makes of the others, of views (V, n, E) and labels (n,); None if none can be left
    out."""
    out = folds(labels, groups)
    logits = []
    for part in out:
        kept = all_but(part, len(labels))
        logits.append(F.linear(views[0, part], *fit(views[:, kept], labels[kept])))
    return (torch.cat(out), torch.cat(logits)) if out else None


def shares(groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """How much each image counts (n,), so that a group counts as much as one image: by the groups (n,), and
    weights of images (n,), whose mean is 1 then.

    >>> shares(torch.tensor([7, 7, 8]))
    tensor([0.5000, 0.5000, 1.0000])
    """
    counts = 1 / torch.bincount(groups)[groups]
    return counts if weights is None else counts * weights / weights.mean()


def all_but(out: Tensor, n: int) -> Tensor:
    """Which of n images (n,) are not at these positions: those that are kept while a fold is left out."""
    return torch.isin(torch.arange(n), out, invert=True)


def within_class(labels: Tensor) -> Tensor:
    """The position (n,) of each image among the images of its class."""
    position = torch.empty_like(labels)
    for label in labels.unique():
        of_class = (labels == label).nonzero().flatten()
        position[of_class] = torch.arange(len(of_class))
    return position
