"""The kinds of heads besides `DCP`: a stored classifier, one that keeps the features of its training images beside, and
learned prompts that do not rewrite each other.

A `LinearHead` stores its classifier: z = f W^T + b                     (B, C)

A `CacheHead` is Tip-Adapter's (Zhang et al., ECCV 2022): zero-shot CLIP plus what similar training images say. With the
zero-shot classifier W (C, E), keys K (n, E), the normalised features of the training images, and their one-hot labels
L (n, C), the values, the logits are not linear:

    z = exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L         (B, C)

ProKeR (Bendou et al., CVPR 2025) solves for other values.

A `PromptHead` is that of CoOp, VPT, MaPLe and PromptSRC. Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new
prompts p before each of the first blocks; sentences of each class take the place of `rest-of-phrase name .` Without
prompts in the text, zero-shot CLIP's template. Images: prompts at the end of the sequence, with new ones before each of
the first blocks. With image features f (B, E) and text features t (C, E):

    z = exp(logit_scale) f t^T                                          (B, C)
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone._torch import WeightCache
from dcp_zoo.backbone.classes import NAME, TEMPLATE, Texts, check_classnames, class_texts, rows_of
from dcp_zoo.backbone.clip import FrozenCLIP, Linear, Reading
from dcp_zoo.backbone.towers.open_clip import EMBEDDING
from dcp_zoo.backbone.towers.text import TextChunks, prompted_text
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
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

    kind = "linear"
    trained: ClassVar[tuple[str, ...]] = ("weight", "bias")
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
        self.classes = self.named = check_classnames(classnames)
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
        return Reading(self.encoder, self.encoder.parts, self.encoder.read, lambda: (self.weight, self.bias))

    def _classify_into(self, names: list[str], texts: Texts | None) -> None:
        """New classes are read by their names; other texts are read for all classes, {} standing for the names."""
        texts = TEMPLATE if isinstance(texts, Mapping) and not texts else texts
        now = texts if texts and (self.texts or not isinstance(texts, str)) else self.texts
        rows = rows_of(names, self.named) if now == self.texts else [None] * len(names)
        weight, bias = self.weight, self.bias
        if new := [name for name, row in zip(names, rows, strict=True) if row is None]:
            if not self.texts:
                limit = "reads no descriptions" if now else f"does not know {', '.join(new[:5])}"
                advice = "For other classes use a head of a method that reads their names: dcp or zero-shot"
                raise ZooError(f"A head of {self.method} is limited to its classes, and {limit}. {advice}.")
            text = F.normalize(self.encoder.encode_sentences(new, now), dim=-1)
            weight, bias = (torch.cat(parts) for parts in zip((weight, bias), self.encoder.scaled(text), strict=True))
        left = iter(range(len(self.weight), len(weight)))
        index = [next(left) if row is None else row for row in rows]
        self.weight, self.bias = weight[index], bias[index]
        self._keep(names, now)

    def _trained_state(self) -> dict[str, Tensor]:
        state = self.encoder.clip.state_dict()
        return super()._trained_state() | {name: state[name] for name in self.changed}

    def _load_trained(self, state: dict[str, Tensor]) -> None:
        self.encoder.clip.load_state_dict({name: state.pop(name) for name in self.changed}, strict=False)
        super()._load_trained(state)


class CacheHead(LinearHead):
    """See the module. Only the keys require gradients, in training.

    Args:
        clip, classnames: see `LinearHead`.
        tensors: W as "weight", and those of `CACHED`.
    """

    kind = "cache"
    trained = ("weight", *CACHED)
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
        return Reading(self.encoder, self.encoder.parts, self.encoder.read, self._no_linear)

    def _no_linear(self) -> NoReturn:
        raise ZooError(
            f"A head of {self.method} keeps its training images, and its logits are no linear function of features: it "
            "cannot be fused, exported or followed by a text probe. Use a head of gda or text-probe, for example."
        )

    def _classify_into(self, names: list[str], texts: Texts | None) -> None:
        """Among its own classes."""
        before = self.named
        super()._classify_into(names, None)
        self.values = self.values[:, rows_of(names, before)]


class PromptHead(Head):
    """See the module. Only the prompts, and what a method derives prompts from, ever require gradients.

    Args:
        clip, classnames: see `LinearHead`.
        text_prompts: (M, Dt) for each of the first text blocks; none for zero-shot CLIP's text.
        vision_prompts: (M, Dv) for each of the first vision blocks, see `FrozenCLIP.entering`.
        texts: what zero-shot CLIP reads of each class: a template, or sentences of each class.
        rest: of the phrase that initialised the text prompts, between them and the name.
    """

    kind = "prompts"
    trained = ("text_prompts.", "vision_prompts.")
    name_tokens: TextChunks | None

    def __init__(
        self,
        clip: FrozenCLIP,
        classnames: Sequence[str],
        text_prompts: Iterable[Tensor] = (),
        vision_prompts: Iterable[Tensor] = (),
        *,
        texts: Texts,
        rest: str = "",
    ) -> None:
        super().__init__(clip)
        self.text_prompts, self.vision_prompts = (
            nn.ParameterList(nn.Parameter(p) for p in prompts).to(self.device)
            for prompts in (text_prompts, vision_prompts)
        )
        self.name_tokens = None
        self.texts, self.rest = texts, rest
        self.template = f"{rest} {NAME}".strip() if self.text_prompts else TEMPLATE
        self._cache = WeightCache()
        self._classify_into(check_classnames(classnames), texts)

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "PromptHead":
        """The head of a checkpoint, by its `config.json` and its tensors' shapes, which `load_head` then loads."""
        in_order = sorted(shapes, key=lambda name: (len(name), name))  # 9 before 10
        prompts: dict[str, list[Tensor]] = {
            tower: [torch.zeros(shapes[name].shape) for name in in_order if name.startswith(tower)]
            for tower in ("text_prompts.", "vision_prompts.")
        }
        block = config["dcp"]
        head = cls(clip, own_names(config), *prompts.values(), texts=block["texts"], rest=block["rest"])
        return head.requires_grad_(False)

    def _classify_into(self, names: list[str], texts: Texts | None) -> None:
        texts = TEMPLATE if isinstance(texts, Mapping) and not texts else texts
        now = texts or self.texts
        class_texts(names, now)  # ZooError if a class has no sentences, before anything is changed
        if self.text_prompts:
            behind = now if isinstance(now, Mapping) else self.template
            self.name_tokens = self.encoder.tokenize_names(names, len(self.text_prompts[0]), behind)
        self._keep(names, now)

    def encode_text(self) -> Tensor:
        """Normalised features (C, E) of the class names."""
        if self.name_tokens is None:
            return self.encoder.zero_shot_classifier(self.named, self.texts)
        return prompted_text(self.encoder.text_tower, self.name_tokens, list(self.text_prompts), self._checkpointed)

    @torch.compiler.disable  # reads texts, and is kept
    def _text_linear(self) -> Linear:
        tensors = [*self.text_prompts, self.encoder.clip.logit_scale]
        depends_on = self.name_tokens, self.named, self.texts
        return self.encoder.scaled(self._cache(self.encode_text, tensors, *depends_on))

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) that enter the first vision blocks."""
        return self.encoder.entering(list(self.vision_prompts))

    def _own_reading(self) -> Reading:
        if not self._prompts_images:
            return Reading(self.encoder, self.encoder.parts, self.encoder.read, self._text_linear)
        parts = {EMBEDDING: self.encoder.num_features}
        encode = lambda images: self.encoder.encode_image(images, self.image_prompts(), self._checkpointed)  # noqa: E731
        return Reading(self.encoder, parts, encode, self._text_linear, self.image_prompts)

    @property
    def _prompts_images(self) -> bool:
        """Whether there are prompts in the image tower, without computing them."""
        return len(self.vision_prompts) > 0

    def method_config(self) -> tuple[Values, Values]:
        return {}, {"head": self.kind, "rest": self.rest}
