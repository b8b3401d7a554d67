"""Heads with a classifier on the image features of a CLIP of which a method may have changed the towers.

With features f (B, E), a linear one:

    z = f weight^T + bias                                           (B, C)

followed by the text probe if the head has one. No text is encoded, except for the names of new classes.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.config import HeadConfig
from dcp_zoo.model.head import Head
from dcp_zoo.model.names import TEMPLATE, Texts, Tokenizer, check_classnames, saved_texts
from dcp_zoo.model.text_probe import Linear


class LinearHead(Head):
    """See the module; nothing in it requires gradients. ZooError for a classifier of another shape.

    Args:
        clip: an open_clip CLIP, in which the method may have changed the tensors `changed`.
        classnames: one name per class.
        weight, bias: of the logits, (C, E) and (C,).
        template: for the names of new classes, or sentences of each class; "" if the method reads no names.
        changed: names of tensors in `clip.state_dict()`, which a checkpoint then holds.
        original: the CLIP without these changes.
        tokenizer: of the CLIP.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        weight: Tensor,
        bias: Tensor,
        *,
        template: Texts = "",
        changed: Sequence[str] = (),
        original: FrozenCLIP | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(clip, tokenizer)
        self.classnames, self.template, self.changed = check_classnames(classnames), template, list(changed)
        self.num_classes, self.original = len(self.classnames), original
        if (tuple(weight.shape), tuple(bias.shape)) != ((self.num_classes, self.num_features), (self.num_classes,)):
            shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            fit = f"which do not fit {self.num_classes} classes and {self.num_features} features"
            raise ZooError(f"The classifier has the shapes {shapes}, {fit}.")
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", bias.detach())
        self.eval()

    @classmethod
    def from_config(
        cls, clip: nn.Module, config: HeadConfig, shapes: Mapping[str, Tensor], tokenizer: Tokenizer | None
    ) -> "LinearHead":
        """The head of a checkpoint, by its `config.json` and its tensors' shapes, which `load_head` then loads."""
        names, known = config["label_names"], clip.state_dict()
        changed = [name for name in shapes if name in known]
        return cls(
            clip,
            names,
            torch.zeros(len(names), FrozenCLIP(clip, tokenizer).num_features),
            torch.zeros(len(names)),
            template=config["dcp"].get("template", ""),
            changed=changed,
            original=FrozenCLIP(copy.deepcopy(clip), tokenizer) if changed else None,
            tokenizer=tokenizer,
        )

    def own_linear(self) -> Linear:
        return self.weight, self.bias

    def trained_state(self) -> dict[str, Tensor]:
        state = self.clip.state_dict()
        return {"weight": self.weight, "bias": self.bias} | {name: state[name] for name in self.changed}

    def load_trained(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        self.clip.load_state_dict({name: state.pop(name) for name in self.changed}, strict=False)
        super().load_trained(state, config)

    def method_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        texts = saved_texts(self.classnames, self.template)
        return {}, {"head": "linear", "method": self.method, "template": texts}

    @property
    def frozen(self) -> FrozenCLIP:
        return self.original or self

    @property
    def is_fitted(self) -> bool:  # a classifier on the frozen tower's features that is no longer one of cosines
        scale = self.clip.logit_scale.exp()
        return not self.changed and not torch.allclose(self.weight.norm(dim=-1), scale.to(self.weight), rtol=0.01)

    @property
    def has_changed_tower(self) -> bool:  # type: ignore[override]
        return bool(self.changed)

    @property
    def texts(self) -> Texts:
        return self.template or TEMPLATE

    def set_classnames(self, classnames: Sequence[str], texts: Texts | None = None) -> None:
        """See `Head.set_classnames`. New classes are read by their names; other texts are read for all classes."""
        names, template = check_classnames(classnames), self.template
        if texts and (template or not isinstance(texts, str)):
            template = texts
        if names == self.classnames and template == self.template:
            return  # as they are, although two may share a name
        known = {name: i for i, name in enumerate(self.classnames)} if template == self.template else {}
        new = [name for name in dict.fromkeys(names) if name not in known]
        weight, bias = self.weight[: len(known)], self.bias[: len(known)]
        if new:
            if not self.template:
                raise self._limited("reads no descriptions" if template else f"does not know {', '.join(new[:5])}")
            text, offset = self.scaled(F.normalize(self.encode_sentences(new, template), dim=-1))
            weight, bias = torch.cat([weight, text]), torch.cat([bias, offset])
        index = known | {name: len(weight) - len(new) + i for i, name in enumerate(new)}
        rows = [index[name] for name in names]
        self.rely_on_texts(template, self.template)
        self.weight, self.bias, self.template = weight[rows], bias[rows], template
        self.classnames, self.num_classes = names, len(names)

    def keep_texts(self, name: str, new: str) -> None:
        if isinstance(self.template, Mapping):
            self.template = {new if known == name else known: texts for known, texts in self.template.items()}

    def add_class(self, name: str, images: Tensor, known: int = 0) -> None:
        """See `Head.add_class`; ZooError also for a new class if the method does not read names."""
        if name not in self.classnames and not self.template:
            raise self._limited(f"does not know {name}")
        super().add_class(name, images, known)

    def _limited(self, limit: str) -> ZooError:
        """The error of a head that reads no names."""
        advice = "For other classes use a head of a method that reads their names: dcp or zero-shot"
        return ZooError(f"A head of {self.method} is limited to its classes, and {limit}. {advice}.")


CACHED = ("keys", "values", "alpha", "beta")


class CacheHead(LinearHead):
    """A head that keeps the features of its training images, Tip-Adapter's (Zhang et al., ECCV 2022): zero-shot CLIP
    plus what similar training images say. With the zero-shot classifier W (C, E), keys K (n, E), the normalised
    features of the training images, and their one-hot labels L (n, C), the values, the logits are not linear:

        z = exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L     (B, C)

    ProKeR (Bendou et al., CVPR 2025) solves for other values. Only the keys require gradients, in training."""

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
