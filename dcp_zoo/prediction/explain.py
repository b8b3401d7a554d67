"""Where in an image the logit of a class comes from."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import FrozenCLIP, Reading, linear_of, parts_of
from dcp_zoo.backbone.towers.open_clip import (
    EMBEDDING,
    EVERY,
    HIDDEN,
    LAST,
    MIDDLE,
    STAGE,
    STEM,
    Block,
    VisionTower,
    append_prompts,
    attend,
)
from dcp_zoo.heads.head import Head
from dcp_zoo.probe.model import mixed, share_of_text

STEPS = 100  # of the way through a gate


@dataclass(frozen=True)
class Explanation:
    """Why a head takes an image for one of its classes, or does not."""

    name: str  # of the class
    shares: np.ndarray  # (H, W), of each pixel in the logit, less the mean logit; negative ones speak against the class
    crop: Image.Image  # what the head reads of the image

    def picture(self) -> Image.Image:
        """The image, and beside it the same, red where it speaks for the class, blue where against it."""
        strength = self.shares[..., None] / max(float(np.abs(self.shares).max()), 1e-9)
        colour = np.where(strength > 0, (215, 25, 28), (44, 80, 200))
        grey = np.asarray(self.crop.convert("L"))[..., None]
        beside = grey + (colour - grey) * 0.8 * np.abs(strength)
        return Image.fromarray(np.concatenate([np.asarray(self.crop), beside.astype(np.uint8)], 1))


@torch.no_grad()
def logit_shares(head: Head, image: Tensor, label: int) -> Tensor:
    """An image (1, 3, H, W), normalised as `create_transform` does -> the share (H, W) of each pixel in
    the logit of a class, less the mean logit. Exact for what is a mean over positions: the logit is a sum
    over these. A share in a token is that by the gradient through the block before, against the mean
    patch. Encoders beside CLIP have none."""
    reads = head.readings
    own = weight_of(head, head.encode_image(image), label).float() / math.sqrt(parts_of(reads))
    shares = own.new_zeros(image.shape[2:])
    for reading, weights in zip(reads, own.split([sum(reading.widths) for reading in reads]), strict=True):
        if isinstance(reading.encoder, FrozenCLIP):
            of_parts = dict(zip(reading.parts, weights.split(reading.widths), strict=True))
            for each in _shares(reading.encoder.vision_tower, reading, of_parts, image):
                pixels = F.interpolate(each[None, None].float(), shares.shape, mode="bilinear")[0, 0]
                shares += pixels * each.numel() / pixels.numel()  # with the same sum
    return shares


@torch.no_grad()
def weight_of(head: Head, features: Tensor, label: int) -> Tensor:
    """The weight (F,) of features (1, F) in the logit of a class, less the mean logit: their product is
    that logit, but for what biases add.

    Through a gate it is the mean gradient on the straight way from no logits to these, with the text's
    share as these features have it: integrated gradients (Sundararajan et al., Axiomatic Attribution for
    Deep Networks, ICML 2017).
    """
    weight, bias = head.linear()
    probe = head.gated_probe
    if probe is None:
        return weight[label] - weight.mean(0)
    text_weight, text_bias = (probe.text_scale * part for part in linear_of(head.readings))
    features = features.to(weight.dtype)
    own = F.linear(features, weight, bias).float()
    text = F.linear(features, text_weight, text_bias).float()
    share = share_of_text(own, text, probe.measure(head.classes)(features, examples=False), probe.gate)
    way = (torch.arange(STEPS, device=share.device)[:, None] + 0.5) / STEPS

    def mean_logit(both: Tensor) -> Tensor:
        logits = mixed(both[0], both[1], share)
        return (logits[:, label] - logits.mean(1)).mean()

    of_own, of_text = _gradient(mean_logit, way * torch.stack([own, text])).sum(1)
    return of_own @ weight.float() + of_text @ text_weight.float()


def _shares(tower: VisionTower, reading: Reading, weights: Mapping[str, Tensor], image: Tensor) -> Iterator[Tensor]:
    """The shares of the parts of a reading in the logit of a class, in grids of positions (h, w)."""
    patches = slice(tower.num_prefix, tower.num_tokens)
    middle = tower.middle
    last = len(tower.blocks) - 1
    prompts = reading.prompts() if reading.prompts else []
    embedded = tower.embed(image).x

    def tokens_into(block: int) -> Tensor:
        """The tokens (1, N, Dv) that enter a block."""
        return tower.run(embedded, prompts, 0, block)

    def logit_of_last(x: Tensor) -> Tensor:
        hidden = tower.hidden(x[:, : tower.pooled])
        logits = []
        for name, part in ((EMBEDDING, tower.project(hidden)[0]), (HIDDEN, hidden[0])):
            if name in weights:
                logits.append(part @ weights[name] / part.norm().detach())  # its length is constant
        return torch.stack(logits).sum()

    if STEM in weights:
        *earlier, maps = tower.stem.stages(tower.checked(image))
        yield from _of_means([tower.stem.widen(maps)], weights[STEM])
        if STAGE in weights:
            yield from _of_means(earlier, weights[STAGE])
    if tower.pooled == 1:
        x = tokens_into(last)
        if last < len(prompts):
            x = append_prompts(x, prompts[last])
        yield _by_class_token(tower.blocks[last], x, patches, logit_of_last).view(tower.grid)
    else:
        x = tower.run(embedded, prompts)
        tokens = x[0, patches]
        shares = _gradient(logit_of_last, x)[0, patches] * (tokens - tokens.mean(0))
        yield shares.sum(-1).view(tower.grid)
    if MIDDLE in weights:
        norm = tower.blocks[middle].norm
        x = norm(tokens_into(middle))
        token = x[0, : tower.num_prefix > 0].flatten()
        mean = x[0, patches].mean(0)
        w = weights[MIDDLE] / torch.cat([token, mean]).norm()
        yield (x[0, patches] @ w[len(token) :] / (patches.stop - patches.start)).view(tower.grid)
        if len(token):

            def logit_of_token(x: Tensor) -> Tensor:
                return norm(x)[0, 0] @ w[: len(token)]

            x = tokens_into(middle - 1)
            yield _by_class_token(tower.blocks[middle - 1], x, patches, logit_of_token).view(tower.grid)
    if LAST in weights:
        x = tower.norm(tower.blocks[last](tokens_into(last), rows=slice(0, None, EVERY)))[0]
        shown = torch.arange(0, tower.num_tokens, EVERY) >= tower.num_prefix
        shares = x.new_zeros(tower.num_tokens)
        shares[::EVERY] = x @ weights[LAST] / x[shown].mean(0).norm() / shown.sum()
        yield shares[patches].view(tower.grid)


def _by_class_token(block: Block, x: Tensor, patches: slice, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The shares of the patches in a value of the class token after a block, which the tokens x (1, N, Dv)
    enter: by its attention to their values."""
    normed = block.norm(x)
    key, taken = block.key_value(normed)
    query = block.query(normed[:, :1])

    def value_of(taken: Tensor) -> Tensor:
        return value(block.finish(x[:, :1], attend(query, key, taken, None, False)))

    values = taken[0, :, patches]
    shares = _gradient(value_of, taken)[0, :, patches] * (values - values.mean(1, keepdim=True))
    return shares.sum((0, 2))


def _gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a value of x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(value(x), x)[0]


def _of_means(maps: Sequence[Tensor], weight: Tensor) -> Iterator[Tensor]:
    """Shares of the positions of maps, each (1, c, h, w), of which the part is the mean."""
    length = torch.cat([each.mean((2, 3)) for each in maps], 1).norm()
    for each, own in zip(maps, weight.split([each.shape[1] for each in maps]), strict=True):
        yield torch.einsum("chw,c->hw", each[0], own) / length / each[0, 0].numel()
