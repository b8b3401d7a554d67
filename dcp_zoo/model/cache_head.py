"""A head that keeps the features of its training images, Tip-Adapter's (Zhang et al., ECCV 2022): zero-shot CLIP plus
what similar training images say. Its logits are no linear function of the features.

With features f (B, E), the zero-shot classifier W (C, E), keys K (n, E), the normalised features of the training
images, and their one-hot labels L (n, C):

    z = exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L     (B, C)

ProKeR (Bendou et al., CVPR 2025) solves for other values in the place of L.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.config import HeadConfig
from dcp_zoo.model.linear_head import LinearHead
from dcp_zoo.model.names import Texts, Tokenizer
from dcp_zoo.model.text_probe import Linear

CACHED = ("keys", "values", "alpha", "beta")


class CacheHead(LinearHead):
    """See the module; `weight` is W, `values` are L, and nothing requires gradients but the `keys` while they are
    trained."""

    is_linear = False
    keys: Tensor
    values: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        tensors: Mapping[str, Tensor],
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        weight = tensors["weight"]
        super().__init__(clip, classnames, weight, torch.zeros_like(weight[:, 0]), tokenizer=tokenizer)
        for name in CACHED:
            self.register_buffer(name, tensors[name])

    @classmethod
    def from_config(
        cls, clip: nn.Module, config: HeadConfig, shapes: Mapping[str, Tensor], tokenizer: Tokenizer | None
    ) -> "CacheHead":
        classes, width = len(config["label_names"]), FrozenCLIP(clip, tokenizer).num_features
        images = len(shapes["keys"]) if "keys" in shapes and shapes["keys"].ndim else 0
        sizes: dict[str, tuple[int, ...]] = {"weight": (classes, width), "keys": (images, width)}
        sizes |= {"values": (images, classes), "alpha": (), "beta": ()}
        empty = {name: torch.zeros(size) for name, size in sizes.items()}
        return cls(clip, config["label_names"], empty, tokenizer=tokenizer)

    def classify(self, features: Tensor) -> Tensor:
        return self.logits(features, self.weight) + self.alpha * self.cached(features, self.beta)

    def cached(self, features: Tensor, beta: float | Tensor) -> Tensor:
        """What the training images say, without alpha: features (B, E) -> (B, C)."""
        return (-beta * (1 - features @ self.keys.T)).exp() @ self.values

    def own_linear(self) -> Linear:
        raise ZooError(
            f"A head of {self.method} keeps its training images, and its logits are no linear function of features: it "
            "cannot be fused, exported or followed by a text probe. Use a head of gda or text-probe, for example."
        )

    def set_classnames(self, classnames: Sequence[str], texts: Texts | None = None) -> None:
        """See `Head.set_classnames`: among its own classes."""
        before = self.classnames
        super().set_classnames(classnames)
        if self.classnames != before:
            self.values = self.values[:, [before.index(name) for name in self.classnames]]

    def trained_state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("weight", *CACHED)}

    def method_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"head": "cache", "method": self.method}
