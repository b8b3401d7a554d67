"""The text probe that a head carries: what it adds to the logits, and how far images are from what it has
seen."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.classes import rows_of
from dcp_zoo.backbone.clip import WeightAndBias

PREFIX = "text_probe."  # of its tensors in a head
PER_CLASS = ("weight", "bias", "means")  # tensors with one row for each class
PENALTIES = (math.inf, 1.0, 0.1, 0.03, 0.01, 0.003, 0.001)  # the first leaves the text alone: its solution is known
NEVER = torch.finfo(torch.float16).min  # a threshold that rejects nothing, also in half precision
BEYOND = 1e4  # a distance that every other threshold rejects
TINY = 1e-12  # a share whose logarithm has a gradient
NO_THRESHOLD = (
    "This head has no threshold to reject images: it was fitted on too few, or for other texts than it has now. "
    "dcp-zoo train sets one, from at least two images of a class and 20 in all."
)


class Distance(NamedTuple):
    """How far images are from what a head has seen: from the nearest of the class means, in one unit. What
    is nearer to one of the examples of no class, by more than a margin, is beyond."""

    unit: Tensor  # ()
    means: Tensor  # (C, F')
    examples: Tensor  # (M, F')
    margin: Tensor  # ()

    def __call__(self, features: Tensor, examples: bool = True) -> Tensor:
        """Features (B, F), of which the last F' columns are read -> distances (B,), with a regard for
        examples."""
        x = features[:, -self.means.shape[1] :].float() * self.unit
        distances = nearest(x, self.means.float())
        if not (examples and len(self.examples)):
            return distances
        return distances.masked_fill(distances - nearest(x, self.examples) > self.margin, BEYOND)


def gated(own: Tensor, text: Tensor, distances: Tensor, gate: Tensor) -> Tensor:
    """Logits (B, C) of the probabilities (1 - q) softmax(own) + q softmax(text), of logits (B, C). The
    text's share is q = far(d) c / (c + w c'): far(d) rises from 0 to 1 between two distances d; c and c' are
    what text and probe give to their first choice beyond a guess. The `gate` (3,) holds the distances, and
    w. Of images unlike those that it has seen a probe knows less than the text, unless the text knows
    nothing of the image.

    >>> own, text = torch.tensor([[2.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    >>> gated(own, text, torch.tensor([1.0, 1.2, 9.0]), torch.tensor([1.1, 1.3, 0.25])).softmax(-1)[:, 0]
    tensor([0.8808, 0.6641, 0.4475])
    """
    return mixed(own.float(), text.float(), share_of_text(own, text, distances, gate))


def share_of_text(own: Tensor, text: Tensor, distances: Tensor, gate: Tensor) -> Tensor:
    """The q (B, 1) of `gated`."""
    near, far, weight = gate.unbind()
    text_confidence = text.float().softmax(-1).amax(-1) - 1 / text.shape[-1] + TINY  # beyond a guess
    confidence = own.float().softmax(-1).amax(-1) - 1 / own.shape[-1] + TINY
    is_far = ((distances.float() - near) / (far - near)).clamp(0, 1)
    share = is_far * text_confidence / (text_confidence + weight * confidence)
    return share[:, None]


def mixed(own: Tensor, text: Tensor, share: Tensor) -> Tensor:
    """The logits (B, C) of `gated` for a share (B, 1) of the text."""
    text = text + own.logsumexp(-1, keepdim=True) - text.logsumexp(-1, keepdim=True)
    return torch.logaddexp((1 - share).log() + own, share.clamp(min=TINY).log() + text)


class HeldOut(NamedTuple):
    """What is said of m training images by what was fitted without them."""

    positions: Tensor  # (m,), of the images
    logits: Tensor  # (m, C)
    text_logits: Tensor  # (m, C), of the method alone
    scores: Tensor | None = None  # `in_distribution_score`s (m,), if there is a threshold
    rejected: Tensor | None = None  # (m,), by the threshold that the images of other folds set


class TextProbe(nn.Module):
    """See the module. `weight` (C, F) and `bias` (C,) are added to the scaled logits, in the order of
    `classes`, those that it was fitted on; `text_scale` multiplies these. `means` (C, F) are their mean
    features.

    Images with an `in_distribution_score` below `threshold` belong to none of the classes. Its distance is
    that of the frozen features to the nearest of the class means, in units of `spread`, the mean of training
    images that were left out, and `BEYOND` where one of the `examples` (M, F'), images of no class, is
    nearer by more than the `margin`; without examples both are empty. Other texts unset the threshold. With
    a `gate` (3,) the text answers for what is far, see `gated`; without, (0,).

    Args:
        classes: those of the head, or as many as its images have.
        widths: of the parts of each reading that it reads.
        changed: how many of the first columns are features that the method changed.
        examples: how many images of no class it knows.
        gate: the numbers of its gate."""

    weight: Tensor
    bias: Tensor
    text_scale: Tensor
    means: Tensor
    threshold: Tensor
    spread: Tensor
    examples: Tensor
    margin: Tensor
    gate: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        widths: Sequence[Sequence[int]],
        changed: int = 0,
        examples: int = 0,
        gate: int = 0,
    ) -> None:
        super().__init__()
        self.classes = list(classes)
        self.widths = [tuple(parts) for parts in widths]
        self.changed = changed
        self.held_out: HeldOut | None = None  # of the fit, if an image could be left out; not saved
        width = sum(map(sum, widths))
        tensors = {
            "weight": torch.zeros(len(classes), width),
            "bias": torch.zeros(len(classes)),
            "text_scale": torch.tensor(1.0),
            "means": torch.zeros(len(classes), width),
            "threshold": torch.tensor(NEVER),
            "spread": torch.tensor(1.0),
            "examples": torch.zeros(examples, width - changed),
            "margin": torch.tensor(0.0) if examples else torch.empty(0),
            "gate": torch.empty(gate),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _ordered(self, rows: Tensor, classes: Sequence[str]) -> Tensor:
        """Rows (C, ...) of its classes in the order of `classes`; 0 for those of which it saw no image."""
        if classes == self.classes:  # the usual case, asked in every forward
            return rows
        index = [len(rows) if row is None else row for row in rows_of(classes, self.classes)]
        return torch.cat([rows, torch.zeros_like(rows[:1])])[index]

    def forward(self, logits: Tensor, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Text logits (B, C) and features (B, F) of the same images -> logits (B, C) for these C classes."""
        weight = self._ordered(self.weight, classes)
        bias = self._ordered(self.bias, classes)
        with torch.autocast(features.device.type, enabled=False):
            text = self.text_scale * logits
            own = text + F.linear(features.to(weight.dtype), weight, bias).to(logits.dtype)
            if not len(self.gate):
                return own
            return gated(own, text, self.measure(classes)(features, examples=False), self.gate)

    def linear(self, text: WeightAndBias, classes: Sequence[str]) -> WeightAndBias:
        """The logits for these C classes as a linear function of the features, which a gate leaves out;
        `text` is that of the text logits."""
        weight = self.text_scale * text[0] + self._ordered(self.weight, classes)
        bias = self.text_scale * text[1] + self._ordered(self.bias, classes)
        return weight, bias

    def measure(self, classes: Sequence[str]) -> Distance:
        """How far images are from what the head has seen of these classes, by the frozen ones of the
        features: about 1 for images like these."""
        parts = sum(map(len, self.widths))
        unit = math.sqrt(parts / (parts - 1 if self.changed else parts)) / self.spread.float()
        means = self._ordered(self.means, classes).float()
        means = means[means.any(1)] if means.any() else means[:1]  # of classes without images none is nearer
        return Distance(unit, means[:, self.changed :] * unit, self.examples.float() * unit, self.margin)

    def cannot_reject(self, classes: Sequence[str]) -> str:
        """Why images cannot be rejected among these classes, and what to do; "" if they can."""
        if self.threshold.item() <= NEVER:
            return NO_THRESHOLD
        seen = self._ordered(self.means, classes).any(1).tolist()
        new = [name for name, known in zip(classes, seen, strict=True) if not known]
        if not new:
            return ""
        return (
            f"This head has seen no image of {', '.join(new[:5])}, and cannot tell what is none of the classes: load "
            "it with its own class names (omit --classes), or train it again with images of these."
        )

    def tensors(self, classes: Sequence[str]) -> dict[str, Tensor]:
        """Its state with the rows of these classes; no threshold, unless it has seen images of all."""
        state = self.state_dict()
        state |= {name: self._ordered(state[name], classes) for name in PER_CLASS}
        if self.cannot_reject(classes):
            state["threshold"] = torch.full_like(self.threshold, NEVER)
        return state


def nearest(x: Tensor, means: Tensor) -> Tensor:
    """The distance (B,) of x (B, E) to the nearest of the means (C, E)."""
    squared = x.square().sum(1, keepdim=True) - 2 * x @ means.T + means.square().sum(1)
    return squared.amin(1).clamp(min=0).sqrt()
