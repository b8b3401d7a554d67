"""Features of a frozen image tower and a small grey copy of each image, in the user's cache. And images that show the
same picture: saved again, resized, mirrored, or with up to a tenth of a side cut off. Pairs with similar features and a
similar coarse picture are laid over each other: a scale and a shift along each axis minimise their squared difference
(Lucas and Kanade, 1981). Those with a correlation above `SAME` match."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item
from dcp_zoo.data.images import GREY, ImageLike, Progress, by_image, grey_copy, in_threads, load_image, no_progress
from dcp_zoo.errors import ZooError
from dcp_zoo.training.cache import features_folder, kept_features, per_image, tower_setting
from dcp_zoo.training.sources import Copies, image_source
from dcp_zoo.zoo.build import plain_clip
from dcp_zoo.zoo.factory import create_transform

BATCH = 64  # images
SIMILAR, COARSE, SAME = 0.8, 0.6, 0.95  # cosine of features; correlations of 8 x 8 pixels, and of the grey copies
NEAREST = 3  # pairs of each image that are looked at
STEPS, FARTHEST = 5, 0.15  # of Gauss-Newton; scale and shift, in halves of a side
FLAT = 2.0  # grey levels: a smaller spread is noise
ROWS = 1024


@dataclass(frozen=True)
class Seen:
    """What is known of n images; those that cannot be read have NaN."""

    parts: np.ndarray  # what a text probe reads: CLIP's embedding and what its image tower has before it, each
    widths: Sequence[int]  # normalised, float32 (n, E + V), and their widths
    grey: np.ndarray  # the images squeezed into a square, uint8 (n, 32, 32); 0 without an image
    errors: dict[int, str]  # why an image cannot be read, by its position

    @property
    def features(self) -> np.ndarray:
        """CLIP's embeddings (n, E), of the length 1."""
        return self.parts[:, : self.widths[0]]

    @property
    def joined(self) -> np.ndarray:
        """All parts (n, E + V), of the length 1."""
        return self.parts / len(self.widths) ** 0.5


def look(images: Sequence[ImageLike], model: FrozenCLIP, keep: bool = False, progress: Progress = no_progress) -> Seen:
    """What is known of images, for `load_image`; with `keep`, those in the user's cache are not read again."""
    errors: dict[int, str] = {}

    def rows(positions: Sequence[int]) -> Iterable[Tensor]:
        batches, total = _rows(images, positions, model, errors), len(images)
        return by_image(progress, batches, "images", total, total - len(positions))

    with kept_features(features_folder()) if keep else nullcontext():
        both = per_image(images, lambda: tower_setting(model, "grey and read"), 1, rows)[0].numpy()
    grey = np.nan_to_num(both[:, : GREY**2]).reshape(-1, GREY, GREY).astype(np.uint8)
    return Seen(both[:, GREY**2 :], model.widths, grey, errors)


@torch.inference_mode()
def _rows(
    images: Sequence[ImageLike], positions: Sequence[int], model: FrozenCLIP, errors: dict[int, str]
) -> Iterator[Tensor]:
    """Batches (1, m, 1024 + E + V) of the grey copies and features of images at these positions, NaN for those that
    cannot be read, of which `errors` then say why."""
    transform = create_transform(model)

    def read(image: ImageLike) -> tuple[Tensor, Tensor] | str:
        try:
            pixels = load_image(image)
        except ZooError as error:
            return error.reason
        return torch.tensor(grey_copy(pixels)).flatten().float(), transform(pixels)

    for start in range(0, len(positions), BATCH):
        part = positions[start : start + BATCH]
        batch = dict(zip(part, in_threads(read, (images[i] for i in part)), strict=True))
        errors |= {i: answer for i, answer in batch.items() if isinstance(answer, str)}
        readable = [place for place, i in enumerate(part) if i not in errors]
        rows = torch.full((len(part), GREY**2 + sum(model.widths)), math.nan)
        if readable:
            grey, inputs = map(torch.stack, zip(*(batch[part[place]] for place in readable), strict=True))
            rows[readable] = torch.cat([grey, model.read(inputs.to(model.device)).float().cpu()], 1)
        yield rows[None]


def same_pictures(features: np.ndarray, grey: np.ndarray) -> list[list[int]]:
    """Groups of positions of the same picture: features (n, E) and grey copies (n, 32, 32) as in `Seen`."""
    readable = np.flatnonzero(~np.isnan(features[:, 0]))
    small = torch.from_numpy(grey[readable])[:, None].float()
    pairs = sorted({(min(pair), max(pair)) for pair in _candidates(torch.from_numpy(features[readable]), small)})
    matches = []
    for start in range(0, len(pairs), ROWS):
        first, second = torch.tensor(pairs[start : start + ROWS]).T
        a, b = small[first], small[second]
        a = torch.where((_alike(a, b) >= _alike(a.flip(-1), b))[:, None, None, None], a, a.flip(-1))
        same = torch.maximum(laid_over(a, b), laid_over(b, a)) > SAME
        matches += [pair for pair, hit in zip(pairs[start : start + ROWS], same.tolist(), strict=True) if hit]
    groups = DisjointSet({i for pair in matches for i in pair})
    for pair in matches:
        groups.merge(*pair)
    return sorted(readable[sorted(group)].tolist() for group in groups.subsets())


def copies(train: Sequence[Item], test: Sequence[Item], known: Copies) -> dict[int, Item]:
    """The test images that show the same picture as a training image, by their positions, and that training image.
    Images whose grey copies are known are read again only if these are alike, and their features are not kept."""
    items, originals = [*train, *test], dict[int, Item]()
    unknown = [item.path for item in items if item.path not in known]
    known = known | dict(zip(unknown, in_threads(lambda path: grey_copy(load_image(path)), unknown), strict=True))
    grey = np.stack([known[item.path] for item in items])
    alike = same_pictures(np.ones((len(items), 1), np.float32), grey)
    left = sorted({i for group in alike for i in group})
    if not left:
        return originals
    model = plain_clip("dcp_mini")  # for which the limits above were chosen
    features = image_source(model, [items[i] for i in left], once=True).features()[0].numpy()
    for group in same_pictures(features, grey[left]):
        first, *rest = (left[i] for i in group)
        if first < len(train):
            originals |= {i - len(train): train[first] for i in rest if i >= len(train)}
    return originals


def _candidates(features: Tensor, grey: Tensor) -> Iterator[tuple[int, int]]:
    """Pairs that may show the same picture: features (n, E), grey (n, 1, 32, 32)."""
    coarse = [_centred(F.avg_pool2d(image, GREY // 8)) for image in (grey, grey.flip(-1))]
    for start in range(0, len(features), ROWS):
        part = slice(start, start + ROWS)
        cosine = features[part] @ features.T
        alike = torch.maximum(*(coarse[0][part] @ other.T for other in coarse))
        score = torch.where((cosine > SIMILAR) & (alike > COARSE), cosine + alike, 0)
        score[torch.arange(len(score)), torch.arange(start, start + len(score))] = 0
        best, columns = score.topk(min(NEAREST, len(features)))
        for row, column in (best > 0).nonzero().tolist():
            yield start + row, int(columns[row, column])


def _centred(images: Tensor) -> Tensor:
    """images (m, 1, h, w) -> (m, h w) of mean 0 and length 1, so that products are correlations; less if flat."""
    rows = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=FLAT * rows.shape[1] ** 0.5)


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """The correlation (m,) of grey copies (m, 1, 32, 32)."""
    return (_centred(a) * _centred(b)).sum(1)


def laid_over(a: Tensor, b: Tensor) -> Tensor:
    """The correlation (m,) of b with the part of a that fits it best: grey copies (m, 1, 32, 32)."""
    axis = (torch.arange(GREY) * 2 + 1) / GREY - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    goal, best = _centred(b), _alike(a, b)
    p = torch.zeros(len(a), 4, 1, 1)  # scale and shift along x, then along y
    for _ in range(STEPS):
        grid = torch.stack([x + p[:, 0] * x + p[:, 1], y + p[:, 2] * y + p[:, 3]], -1)
        part = F.grid_sample(a, grid, padding_mode="border", align_corners=False)[:, 0]
        dy, dx = torch.gradient(part, spacing=2 / GREY, dim=(1, 2))
        slopes = torch.stack([dx * x, dx, dy * y, dy], -1).flatten(1, 2)
        slopes = slopes - slopes.mean(1, keepdim=True)
        rows = part.flatten(1) - part.flatten(1).mean(1, keepdim=True)
        length = rows.norm(dim=1, keepdim=True).clamp(min=FLAT * GREY)
        best = torch.maximum(best, (rows / length * goal).sum(1))
        square = slopes.mT @ slopes
        square = square + (1e-3 * square.diagonal(dim1=1, dim2=2).mean(1) + 1e-6)[:, None, None] * torch.eye(4)
        step = torch.linalg.solve(square, slopes.mT @ (goal * length - rows)[..., None])
        p = (p + step[..., None]).clamp(-FARTHEST, FARTHEST)
    return best
