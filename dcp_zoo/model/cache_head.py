"""A head that keeps the features of its training images, Tip-Adapter's (Zhang et al., ECCV 2022): zero-shot CLIP plus
what similar training images say. With the zero-shot classifier W (C, E), keys K (n, E), the normalised features of the
training images, and their one-hot labels L (n, C), the values, the logits are not linear:

    z = exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L     (B, C)

ProKeR (Bendou et al., CVPR 2025) solves for other values.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.model.classes import Class, Texts, rows_of
from dcp_zoo.model.clip import FrozenCLIP, Reading
from dcp_zoo.model.config import HeadConfig
from dcp_zoo.model.head import LinearHead

CACHED = ("keys", "values", "alpha", "beta")


class CacheHead(LinearHead):
    """See the module. Only the keys require gradients, in training.

    Args:
        clip, classnames: see `LinearHead`.
        tensors: W as "weight", and those of `CACHED`.
    """

    keys: Tensor
    values: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, clip: nn.Module, classnames: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        weight = tensors["weight"]
        super().__init__(clip, classnames, weight, torch.zeros_like(weight[:, 0]))
        for name in CACHED:
            self.register_buffer(name, tensors[name])

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "CacheHead":
        """The head of a checkpoint, by its `config.json` and its tensors' shapes, which `load_head` then loads."""
        classes, width = len(config["label_names"]), clip.num_features
        images = len(shapes["keys"]) if "keys" in shapes and shapes["keys"].ndim else 0
        sizes: dict[str, tuple[int, ...]] = {"weight": (classes, width), "keys": (images, width)}
        sizes |= {"values": (images, classes), "alpha": (), "beta": ()}
        return cls(clip, config["label_names"], {name: torch.zeros(size) for name, size in sizes.items()})

    def classify(self, features: Tensor) -> Tensor:
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

    def classify_into(self, classes: list[Class], texts: Texts | None) -> None:
        """Among its own classes."""
        before = self.classes
        super().classify_into(classes, None)
        self.values = self.values[:, rows_of(classes, before)]

    def _trained_state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("weight", *CACHED)}

    def _method_config(self) -> tuple[Values, Values]:
        return {}, {"head": "cache"}
