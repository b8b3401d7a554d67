"""Heads whose own classifier is stored: a linear one, and one that keeps the features of its training images beside.

A `CacheHead` is Tip-Adapter's (Zhang et al., ECCV 2022): zero-shot CLIP plus what similar training images say. With the
zero-shot classifier W (C, E), keys K (n, E), the normalised features of the training images, and their one-hot labels
L (n, C), the values, the logits are not linear:

    z = exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L     (B, C)

ProKeR (Bendou et al., CVPR 2025) solves for other values.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import TEMPLATE, Class, Texts, check_classnames, matched, names_of, read_of, rows_of
from dcp_zoo.backbone.clip import FrozenCLIP, Reading
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.config import HeadConfig, own_names
from dcp_zoo.heads.head import Head

CACHED = ("keys", "values", "alpha", "beta")  # tensors of a `CacheHead`, besides its weight


class LinearHead(Head):
    """A head whose own classifier is stored: weight (C, E) and bias (C,), by the features of a CLIP of which a method
    may have changed the towers. No text is encoded, except for the names of new classes. Nothing requires gradients.
    ZooError for a classifier of another shape.

    Args:
        clip, original: see `Head`.
        classnames: one name per class.
        weight, bias: of the logits, (C, E) and (C,).
        texts: for the names of new classes, or sentences of each class; "" if the method reads no names.
        changed: names of tensors in `clip.state_dict()`, which a checkpoint then holds.
    """

    kind, trained = "linear", ("weight", "bias")
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        clip: FrozenCLIP,
        classnames: Sequence[str],
        weight: Tensor,
        bias: Tensor,
        *,
        texts: Texts = "",
        changed: Sequence[str] = (),
        original: FrozenCLIP | None = None,
    ) -> None:
        super().__init__(clip, original)
        self.classes = self.named = matched(check_classnames(classnames))
        self.texts, self.changed = texts, list(changed)
        shapes = (self.num_classes, self.encoder.num_features), (self.num_classes,)
        if (tuple(weight.shape), tuple(bias.shape)) != shapes:
            problem = f"The classifier has the shapes {tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ZooError(f"{problem}, which do not fit {shapes[0][0]} classes and {shapes[0][1]} features.")
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", bias.detach())
        self.eval()

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "LinearHead":
        """The head of a checkpoint, by its `config.json` and its tensors' shapes, which `load_head` then loads."""
        names, known = own_names(config), clip.clip.state_dict()
        changed = [name for name in shapes if name in known]
        own = clip.with_clip(copy.deepcopy(clip.clip)) if changed else clip
        empty = torch.zeros(len(names), clip.num_features), torch.zeros(len(names))
        original = clip if changed else None
        return cls(own, names, *empty, texts=config["dcp"]["texts"], changed=changed, original=original)

    def _own_reading(self) -> Reading:
        return Reading(self.encoder, self.encoder.widths, self.encoder.read, lambda: (self.weight, self.bias))

    def _classify_into(self, classes: list[Class], texts: Texts | None) -> None:
        """New classes are read by their names; other texts are read for all classes, {} standing for the names."""
        texts = TEMPLATE if isinstance(texts, Mapping) and not texts else texts
        now = texts if texts and (self.texts or not isinstance(texts, str)) else self.texts
        rows = rows_of(classes, self.named) if now == self.texts else [None] * len(classes)
        weight, bias = self.weight, self.bias
        if new := [each for each, row in zip(classes, rows, strict=True) if row is None]:
            if not self.texts:
                raise self._limited("reads no descriptions" if now else f"does not know {', '.join(names_of(new)[:5])}")
            text = F.normalize(self.encoder.encode_sentences(read_of(new), now), dim=-1)
            weight, bias = (torch.cat(parts) for parts in zip((weight, bias), self.encoder.scaled(text), strict=True))
        known = len(self.weight)
        index = [known + new.index(each) if row is None else row for each, row in zip(classes, rows, strict=True)]
        self.weight, self.bias = weight[index], bias[index]
        self._keep(classes, now)

    def _limited(self, limit: str) -> ZooError:
        """The error of a head that reads no names."""
        advice = "For other classes use a head of a method that reads their names: dcp or zero-shot"
        return ZooError(f"A head of {self.method} is limited to its classes, and {limit}. {advice}.")

    def _trained_state(self) -> dict[str, Tensor]:
        state = self.encoder.clip.state_dict()
        return super()._trained_state() | {name: state[name] for name in self.changed}

    def _load_trained(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        self.encoder.clip.load_state_dict({name: state.pop(name) for name in self.changed}, strict=False)
        super()._load_trained(state, config)


class CacheHead(LinearHead):
    """See the module. Only the keys require gradients, in training.

    Args:
        clip, classnames: see `LinearHead`.
        tensors: W as "weight", and those of `CACHED`.
    """

    kind, trained = "cache", ("weight", *CACHED)
    keys: Tensor
    values: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, clip: FrozenCLIP, classnames: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        weight = tensors["weight"]
        super().__init__(clip, classnames, weight, torch.zeros_like(weight[:, 0]))
        for name in CACHED:
            self.register_buffer(name, tensors[name])

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "CacheHead":
        """The head of a checkpoint, by its `config.json` and its tensors' shapes, which `load_head` then loads."""
        names, width = own_names(config), clip.num_features
        images = len(shapes["keys"]) if "keys" in shapes and shapes["keys"].ndim else 0
        sizes: dict[str, tuple[int, ...]] = {"weight": (len(names), width), "keys": (images, width)}
        sizes |= {"values": (images, len(names)), "alpha": (), "beta": ()}
        return cls(clip, names, {name: torch.zeros(size) for name, size in sizes.items()})

    def classify(self, features: Tensor) -> Tensor:
        if self.fc is not None:
            return super().classify(features)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.weight.dtype)
            return self.encoder.logits(features, self.weight) + self.alpha * self.cached(features, self.beta)

    def cached(self, features: Tensor, beta: float | Tensor) -> Tensor:
        """What the training images say, without alpha: features (B, E) -> (B, C)."""
        return (-beta * (1 - features @ self.keys.T)).exp() @ self.values

    def _own_reading(self) -> Reading:
        return Reading(self.encoder, self.encoder.widths, self.encoder.read, self._no_linear)

    def _no_linear(self) -> NoReturn:
        raise ZooError(
            f"A head of {self.method} keeps its training images, and its logits are no linear function of features: it "
            "cannot be fused, exported or followed by a text probe. Use a head of gda or text-probe, for example."
        )

    def _classify_into(self, classes: list[Class], texts: Texts | None) -> None:
        """Among its own classes."""
        before = self.named
        super()._classify_into(classes, None)
        self.values = self.values[:, rows_of(classes, before)]
