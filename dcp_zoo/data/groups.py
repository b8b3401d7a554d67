"""Groups: images that were not taken independently of each other, such as the photographs of a burst.
No measurement trains on one part of a group and tests on another.

Images are in one group if one camera took them within `SECONDS` of each other, or if they are near
copies: the same picture saved again, resized, mirrored, cropped, turned, with a frame or another
exposure, as frames of a film are. Each image and the nearest ones by features are laid over each other:
an affine map maximises the correlation of their grey copies where they overlap, from coarse to fine
(Evangelidis and Psarakis, Parametric Image Alignment Using Enhanced Correlation Coefficient
Maximization, PAMI 2008). Near copies are alike then, and so are their details. Features of a picture
that was turned by 90 or 180 degrees are others: so the nearest by a mean of the grey copy in all ways
to turn and mirror it are looked at, too, if they are alike in one of these, both without frames.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.data.images import GREY
from dcp_zoo.data.splits import Item

SECONDS = 3.0  # between two photographs of a burst
NEAREST = 4  # pairs of each image that are looked at
ROWS = 1024  # images or pairs that are computed at a time
COARSE = 0.75  # least correlation of near copies: of 8 x 8 pixels,
ALIKE = 0.85  # of grey copies,
DETAILS = 0.85  # and of their details, see `_details`
SMALL = 8  # pixels of a side, for the first maps
FIRST_STEPS = 8  # Gauss-Newton steps from each of `STARTS`
STEPS = {16: 6, 32: 5}  # steps by the pixels of a side, from coarse to fine
FARTHEST = 0.45  # entries of an affine map, in halves of a side
OVERLAP = 0.5  # share of the image that is compared
STARTS = (
    (0, 0, 0),
    *((-0.2, x, y) for x in (-0.2, 0.2) for y in (-0.2, 0.2)),
)  # scale and shift of first maps
UPRIGHT = 2  # how many of `_all_ways`: as it is, and mirrored
ALL_WAYS = 8
FLAT = 2.0  # grey levels: a smaller standard deviation is noise
BLUR = 5  # pixels


def group_ids(groups: Sequence[Hashable]) -> Tensor:
    """Integers (n,), the same for images of one group: by the name of each one's group, "" or None for
    an image alone.

    >>> group_ids(["a", "", "b", "a", ""])
    tensor([0, 1, 2, 0, 3])
    """
    names = [group or (i,) for i, group in enumerate(groups)]
    ids = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([ids[name] for name in names])


def find_groups(features: np.ndarray, facts: np.ndarray) -> list[list[int]]:
    """Groups of positions, without images that are alone.

    Args:
        features: of n images (n, F), by any frozen image tower. Rows of NaN, of images that cannot be
            read, are in no group.
        facts: the numbers of their `Facts` (n, 2051).
    """
    return joined([*near_copies(features, facts), *bursts(facts)])


def with_groups(items: Sequence[Item], groups: Iterable[Sequence[int]]) -> list[Item]:
    """The items in these groups of positions, which are named by their numbers; the others are alone."""
    grouped = [item._replace(group="") for item in items]
    for number, group in enumerate(groups, 1):
        for i in group:
            grouped[i] = items[i]._replace(group=str(number))
    return grouped


def groups_text(items: Sequence[Item]) -> str:
    """Such as "80 images in 23 groups"; "" if each is alone."""
    groups = len({item.group or i for i, item in enumerate(items)})
    return "" if groups == len(items) else f"{len(items):,} images in {groups:,} groups that were taken together"


def joined(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The groups in which these pairs are."""
    from scipy.cluster.hierarchy import DisjointSet  # slow, and predictions need no groups

    groups = DisjointSet({i for pair in pairs for i in pair})
    for pair in pairs:
        groups.merge(*pair)
    return sorted(sorted(group) for group in groups.subsets())


def bursts(facts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of photographs that one camera took one after the other, within `SECONDS`, by the
    numbers of their `Facts` (n, 2051)."""
    moments = []
    for i, (camera, day, second) in enumerate(facts[:, 2 * GREY**2 :].astype(float).tolist()):
        if camera > 0:
            moments.append((camera, 86400 * day + second, i))
    for (camera, before, i), (other, after, j) in pairwise(sorted(moments)):
        if camera == other and after - before <= SECONDS:
            yield i, j


def near_copies(features: np.ndarray, facts: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of near copies; arguments as of `find_groups`."""
    readable = np.flatnonzero(~np.isnan(features[:, 0]))
    grey = torch.from_numpy(facts[readable, : 2 * GREY**2]).float().view(-1, 2, GREY, GREY)
    whole, unframed = grey.split(1, 1)
    by_features = _nearest(torch.from_numpy(features[readable]).float())
    mean = torch.stack(_all_ways(_shrunk(unframed, 16))).sum(0).flatten(1)  # that of a turned copy is the same
    by_mean = _nearest(mean - mean.mean(1, keepdim=True))
    candidates = torch.cat([by_features, by_mean]).unique(dim=0)
    # the other way round, as some are found only if the second one is laid over the first one
    found = [
        *_copies(whole, by_features, UPRIGHT, -1),
        *_copies(unframed, candidates.flip(1), ALL_WAYS, COARSE),
    ]
    pairs = torch.cat(found).sort(1).values.tolist()
    return sorted({(int(readable[i]), int(readable[j])) for i, j in pairs})


def _copies(grey: Tensor, pairs: Tensor, ways: int, least: float) -> Iterator[Tensor]:
    """Those of the pairs that show the same picture.

    Args:
        grey: grey copies (n, 1, 32, 32).
        pairs: positions (m, 2).
        ways: in so many of `_all_ways` the first image is tried; it is turned to that which is most alike.
        least: pairs whose 8 x 8 pixels correlate less are no candidates.
    """
    for part in pairs.split(ROWS):
        a, b = grey[part.T]
        other = _normalised(_shrunk(b, SMALL))
        turned = _all_ways(_normalised(_shrunk(a, SMALL)))[:ways]
        correlations = torch.stack([(image * other).mean((1, 2, 3)) for image in turned])
        best, way = correlations.max(0)
        tried = (best > least).nonzero().flatten()
        upright = torch.stack(_all_ways(a[tried])[:ways])[way[tried], torch.arange(len(tried))]
        yield part[tried][are_copies(upright, b[tried])]


def _shrunk(images: Tensor, side: int) -> Tensor:
    """Grey copies (m, 1, 32, 32) with fewer pixels."""
    return F.avg_pool2d(images, GREY // side)


def _normalised(images: Tensor) -> Tensor:
    """Images with a mean of 0 and a standard deviation of 1."""
    return F.layer_norm(images, images.shape[1:])


def _all_ways(images: Tensor) -> list[Tensor]:
    """Images (m, 1, s, s) as they are, mirrored, and in the six other ways to turn and mirror them by
    right angles."""
    return [each.flip(axes) for each in (images, images.mT) for axes in ((), (-1,), (-2,), (-2, -1))]


def _nearest(features: Tensor) -> Tensor:
    """Pairs (m, 2) of each row (n, F) and the `NEAREST` rows by the cosine, each pair once."""
    x = F.normalize(features, dim=1)
    pairs = [torch.empty(0, 2, dtype=torch.long)]
    for rows in torch.arange(len(x)).split(ROWS):
        cosine = x[rows] @ x.T
        cosine[torch.arange(len(rows)), rows] = -2  # not the row itself
        best = cosine.topk(min(NEAREST, len(x) - 1)).indices
        ends = torch.stack([rows[:, None].expand_as(best), best], -1).flatten(0, 1)
        pairs.append(ends.sort(1).values)
    return torch.cat(pairs).unique(dim=0)


def are_copies(a: Tensor, b: Tensor) -> Tensor:
    """Whether each of two grey copies (m, 1, 32, 32) shows the same picture (m,)."""
    starts = torch.tensor([[scale, 0, x, 0, scale, y] for scale, x, y in STARTS])
    small_a = _shrunk(a, SMALL).repeat_interleave(len(starts), 0)
    small_b = _shrunk(b, SMALL).repeat_interleave(len(starts), 0)
    maps = align(small_a, small_b, starts.repeat(len(a), 1), FIRST_STEPS)
    best, start = Overlap(small_a, small_b, maps).correlation.view(len(a), len(starts)).max(1)
    same = best > COARSE
    maps = maps.view(len(a), len(starts), 6)[torch.arange(len(a)), start][same]
    a = a[same]
    b = b[same]
    for side, steps in STEPS.items():
        maps = align(_shrunk(a, side), _shrunk(b, side), maps, steps)
    overlap = Overlap(a, b, maps)
    details = overlap.product(_details(overlap.part), _details(b))
    same[same.clone()] = (overlap.correlation > ALIKE) & (details > DETAILS)
    return same


def align(a: Tensor, b: Tensor, maps: Tensor, steps: int) -> Tensor:
    """Affine maps after so many Gauss-Newton steps that raise the correlation of two images where they
    overlap.

    Args:
        a, b: images (m, 1, s, s).
        maps: from b to a (m, 6): a map of zeros is the identity; a side is 2 long.
        steps: their number.
    """
    side = a.shape[-1]
    positions = _positions(side)
    for _ in range(steps):
        overlap = Overlap(a, b, maps)
        weights = overlap.weights
        dy, dx = torch.gradient(overlap.part[:, 0], spacing=2 / side, dim=(1, 2))
        slopes = torch.cat([dx[:, None] * positions, dy[:, None] * positions], 1).flatten(2)  # (m, 6, s s)
        slopes = slopes - slopes @ weights[..., None]
        image, spread = overlap.standard(overlap.part)
        goal, _ = overlap.standard(b)
        square = (slopes * weights[:, None]) @ slopes.mT
        damping = 1e-3 * square.diagonal(dim1=1, dim2=2).mean(1) + 1e-6
        square = square + damping[:, None, None] * torch.eye(6)
        step = torch.linalg.solve(square, slopes @ (weights * spread * (goal - image))[..., None])
        maps = (maps + step[..., 0]).clamp(-FARTHEST, FARTHEST)
    return maps


def _positions(side: int) -> Tensor:
    """(x, y, 1) of each pixel of a square (3, s, s), from -1 to 1."""
    axis = (torch.arange(side) * 2 + 1) / side - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


class Overlap:
    """Images a (m, 1, s, s) that are laid over b by maps (m, 6).

    Attributes:
        part: of a, that lies under each pixel of b (m, 1, s, s).
        weights: of these pixels (m, s s), which sum to 1: 0 where a is not.
    """

    def __init__(self, a: Tensor, b: Tensor, maps: Tensor) -> None:
        self.b = b
        affine = maps.view(-1, 2, 3) + torch.eye(2, 3)
        grid = torch.tensordot(affine, _positions(a.shape[-1]), 1).permute(0, 2, 3, 1)  # (m, s, s, 2)
        self.part = F.grid_sample(a, grid, padding_mode="border", align_corners=False)
        self.inside = (grid.abs() <= 1).all(-1).flatten(1).float()
        self.weights = self.inside / self.inside.sum(1, keepdim=True).clamp(min=1)

    def standard(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (m, 1, s, s) with a weighted mean of 0 and a standard deviation of 1 (m, s s), less if they
        are flat; and the deviations (m, 1) that they had."""
        rows = images.flatten(1)
        centred = rows - (self.weights * rows).sum(1, keepdim=True)
        spread = (self.weights * centred.square()).sum(1, keepdim=True).sqrt().clamp(min=FLAT)
        return centred / spread, spread

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The correlation (m,) of images where they overlap."""
        return (self.weights * self.standard(a)[0] * self.standard(b)[0]).sum(1)

    @property
    def correlation(self) -> Tensor:
        """Of a and b (m,), 0 where too little overlaps."""
        return self.product(self.part, self.b) * (self.inside.mean(1) > OVERLAP)


def _details(images: Tensor) -> Tensor:
    """Images (m, 1, s, s) minus themselves blurred."""
    padded = F.pad(images, (BLUR // 2,) * 4, mode="replicate")
    return images - F.avg_pool2d(padded, BLUR, 1)
