"""Groups: images that were not taken independently of each other, such as the photographs of a burst. No measurement
trains on one part of a group and tests on another.

Images are in one group if one camera took them within `SECONDS` of each other, or if they are near copies: the same
picture saved again, resized, mirrored, cropped, turned or with another exposure, as frames of a film are. Each image
and the nearest ones by features are laid over each other: an affine map maximises the correlation of their grey copies
where they overlap, from coarse to fine (Evangelidis and Psarakis, Parametric Image Alignment Using Enhanced Correlation
Coefficient Maximization, PAMI 2008). Near copies are alike then, and so are their details.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.data.images import GREY, Facts
from dcp_zoo.data.splits import Item

SECONDS = 3.0  # between two photographs of a burst
NEAREST = 4  # pairs of each image that are looked at
CELL, ROWS = 2000, 1024  # images that are compared with each other, see `_cells`; rows at a time
COARSE, ALIKE, DETAILS = 0.75, 0.85, 0.85  # correlations of 8 x 8 pixels, of grey copies, and of what blurring takes
SIDES, STEPS = (8, 16, 32), (8, 6, 5)  # pixels, and Gauss-Newton steps with so many
FARTHEST, OVERLAP = 0.45, 0.5  # entries of an affine map, in halves of a side; share of the image that is compared
STARTS = ((0, 0, 0), *((-0.2, x, y) for x in (-0.2, 0.2) for y in (-0.2, 0.2)))  # scale and shift of first maps
FLAT, BLUR = 2.0, 5  # grey levels: a smaller spread is noise; pixels
FACTS = GREY**2 + 3  # numbers of `numbers`


def group_ids(groups: Sequence[Hashable]) -> Tensor:
    """Integers (n,), the same for images of one group: by the name of each one's group, "" or None for an image alone.

    >>> group_ids(["a", "", "b", "a", ""])
    tensor([0, 1, 2, 0, 3])
    """
    names = [group or (i,) for i, group in enumerate(groups)]
    ids = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([ids[name] for name in names])


def numbers(facts: Facts) -> np.ndarray:
    """The grey copy of an image and when it was taken, float32 (1027,): exact, and kept as features are."""
    return np.concatenate([facts.grey.ravel(), facts.taken], dtype=np.float32)


def find_groups(features: np.ndarray, facts: np.ndarray) -> list[list[int]]:
    """Groups of positions, without images that are alone, of features (n, F) of any frozen image tower and `numbers`
    (n, 1027). Rows of NaN, of images that cannot be read, are in no group."""
    return joined([*near_copies(features, facts), *bursts(facts)])


def grouped(items: Sequence[Item], find: Callable[[], list[list[int]]]) -> list[Item]:
    """The items with the groups that they were given or, if none has one, with those that `find` finds."""
    if any(item.group for item in items):
        return list(items)
    names = {i: str(number) for number, group in enumerate(find(), 1) for i in group}
    return [item._replace(group=names.get(i, "")) for i, item in enumerate(items)]


def in_groups(items: Sequence[Item]) -> str:
    """Such as "80 images in 23 groups"; "" if each is alone."""
    groups = len({item.group or i for i, item in enumerate(items)})
    return "" if groups == len(items) else f"{len(items):,} images in {groups:,} groups that were taken together"


def joined(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The groups in which these pairs are."""
    groups = DisjointSet({i for pair in pairs for i in pair})
    for pair in pairs:
        groups.merge(*pair)
    return sorted(sorted(group) for group in groups.subsets())


def bursts(facts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of photographs that one camera took one after the other, within `SECONDS`, by their `numbers` (n, 1027)."""
    rows = enumerate(facts[:, GREY**2 :].astype(float).tolist())
    moments = [(camera, 86400 * day + second, i) for i, (camera, day, second) in rows if camera > 0]
    for (camera, one, i), (same, other, j) in pairwise(sorted(moments)):
        if camera == same and other - one <= SECONDS:
            yield i, j


def near_copies(features: np.ndarray, facts: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of near copies; arguments as of `find_groups`."""
    readable = np.flatnonzero(~np.isnan(features[:, 0]))
    small = torch.from_numpy(facts[readable, : GREY**2]).float().view(-1, 1, GREY, GREY)
    pairs = _nearest(torch.from_numpy(features[readable]).float())
    copies = [part[are_copies(*small[part.T])] for part in pairs.split(ROWS)]
    return [(int(readable[i]), int(readable[j])) for part in copies for i, j in part.tolist()]


def _nearest(features: Tensor) -> Tensor:
    """Pairs (m, 2) of each row (n, F) and the `NEAREST` rows by the cosine, each pair once."""
    x, pairs = F.normalize(features, dim=1), [torch.empty(0, 2, dtype=torch.long)]
    for cell in _cells(x):
        of_cell = x[cell]
        for rows in torch.arange(len(cell)).split(ROWS):
            cosine = of_cell[rows] @ of_cell.T
            cosine[torch.arange(len(rows)), rows] = -2
            best = cosine.topk(min(NEAREST, len(cell) - 1)).indices
            ends = torch.stack([rows[:, None].expand_as(best), best], -1).flatten(0, 1)
            pairs.append(cell[ends].sort(1).values)
    return torch.cat(pairs).unique(dim=0)


def _cells(x: Tensor) -> list[Tensor]:
    """Positions of rows (n, F) among which the nearest ones are sought, so that this takes time in proportion to n: all
    of a few; of many, each is in the cells of the two nearest of some rows, which near copies share."""
    if len(x) <= 2 * CELL:
        return [torch.arange(len(x))]
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: len(x) // CELL]]
    cell = torch.cat([(rows @ centres.T).topk(2).indices for rows in x.split(ROWS)]).flatten()
    return list((cell.argsort(stable=True) // 2).split(torch.bincount(cell, minlength=len(centres)).tolist()))


def are_copies(a: Tensor, b: Tensor) -> Tensor:
    """Whether each of two grey copies (m, 1, 32, 32) shows the same picture (m,)."""
    small, mirrored, other = (F.avg_pool2d(images, GREY // SIDES[0]) for images in (a, a.flip(-1), b))
    whole = torch.zeros(len(a), 6)
    is_mirrored = correlation(small, other, whole)[0] < correlation(mirrored, other, whole)[0]
    a = torch.where(is_mirrored[:, None, None, None], a.flip(-1), a)
    small = torch.where(is_mirrored[:, None, None, None], mirrored, small)
    starts = torch.tensor([[scale, 0, x, 0, scale, y] for scale, x, y in STARTS]).repeat(len(a), 1)
    small, other = (images.repeat_interleave(len(STARTS), 0) for images in (small, other))
    maps = align(small, other, starts, STEPS[0])
    best, start = correlation(small, other, maps)[0].view(len(a), -1).max(1)
    same = best > COARSE
    p = maps.view(len(a), -1, 6)[torch.arange(len(a)), start]
    a, b, p = a[same], b[same], p[same]
    for side, steps in zip(SIDES[1:], STEPS[1:], strict=True):
        p = align(F.avg_pool2d(a, GREY // side), F.avg_pool2d(b, GREY // side), p, steps)
    value, part, weights = correlation(a, b, p)
    fine = (weights * _standard(_details(part), weights)[0] * _standard(_details(b), weights)[0]).sum(1)
    same[same.clone()] = (value > ALIKE) & (fine > DETAILS)
    return same


def align(a: Tensor, b: Tensor, p: Tensor, steps: int) -> Tensor:
    """Affine maps p (m, 6) from b to a, images (m, 1, s, s), after so many Gauss-Newton steps that raise their
    correlation where they overlap. p = (0, ..) is the identity; a side is 2 long."""
    side = a.shape[-1]
    y, x = _axes(side)
    for _ in range(steps):
        part, weights = _laid_over(a, p)
        dy, dx = torch.gradient(part[:, 0], spacing=2 / side, dim=(1, 2))
        slopes = torch.stack([dx * x, dx * y, dx, dy * x, dy * y, dy], -1).flatten(1, 2)  # (m, s s, 6)
        slopes = slopes - (weights[..., None] * slopes).sum(1, keepdim=True)
        (r, spread), (goal, _) = _standard(part.flatten(1), weights), _standard(b.flatten(1), weights)
        square = slopes.mT @ (slopes * weights[..., None])
        square = square + (1e-3 * square.diagonal(dim1=1, dim2=2).mean(1) + 1e-6)[:, None, None] * torch.eye(6)
        step = torch.linalg.solve(square, slopes.mT @ (weights * spread * (goal - r))[..., None])
        p = (p + step[..., 0]).clamp(-FARTHEST, FARTHEST)
    return p


def correlation(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The correlation (m,) of images a and b (m, 1, s, s) by the maps p (m, 6), 0 where too little overlaps; with the
    part of a that lies under b (m, 1, s, s), and what counts of it (m, s s), 1 in all."""
    part, weights = _laid_over(a, p)
    value = (weights * _standard(part.flatten(1), weights)[0] * _standard(b.flatten(1), weights)[0]).sum(1)
    return value * ((weights > 0).float().mean(1) > OVERLAP), part, weights


def _axes(side: int) -> tuple[Tensor, ...]:
    axis = (torch.arange(side) * 2 + 1) / side - 1
    return torch.meshgrid(axis, axis, indexing="ij")


def _laid_over(a: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    (y, x), q = _axes(a.shape[-1]), p[:, :, None, None]
    grid = torch.stack([x + q[:, 0] * x + q[:, 1] * y + q[:, 2], y + q[:, 3] * x + q[:, 4] * y + q[:, 5]], -1)
    part = F.grid_sample(a, grid, padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1).all(-1).flatten(1).float()
    return part, inside / inside.sum(1, keepdim=True).clamp(min=1)


def _standard(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (m, k) with a weighted mean of 0 and a deviation of 1, less if they are flat; and the deviations (m, 1)."""
    centred = rows - (weights * rows).sum(1, keepdim=True)
    spread = (weights * centred.square()).sum(1, keepdim=True).sqrt().clamp(min=FLAT)
    return centred / spread, spread


def _details(images: Tensor) -> Tensor:
    """Images (m, 1, s, s) without what is left of them if they are blurred -> (m, s s)."""
    padded = F.pad(images, (BLUR // 2,) * 4, mode="replicate")
    return (images - F.avg_pool2d(padded, BLUR, 1)).flatten(1)
