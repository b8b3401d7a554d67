"""The kinds of heads besides `DCP`: a stored classifier, one that changes features first, one that keeps those
of its training images beside, learned prompts that do not rewrite each other, and some that depend on the image.

A `LinearHead` stores its classifier: z = f W^T + b                     (B, C)

An `AdapterHead` is CLIP-Adapter's (Gao et al., IJCV 2024). With the zero-shot classifier, ratio r and learned
matrices D (H, E) and U (E, H), H = E / 4:

    z = f' W^T / |f'| + b    with f' = r relu(relu(f D^T) U^T) + (1 - r) f  (B, C)

A `CacheHead` is Tip-Adapter's (Zhang et al., ECCV 2022): zero-shot CLIP plus the labels of similar training
images. With the zero-shot classifier W (C, E), keys K (n, E), the normalised features of the training
images, and their one-hot labels L (n, C), the values, the logits are not linear:

    z = exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L         (B, C)

ProKeR (Bendou et al., CVPR 2025) solves for other values.

A `PromptHead` is that of CoOp, VPT, MaPLe and PromptSRC. Text: `[SOS] p_1 .. p_M rest-of-phrase name .
[EOT]`, with new prompts p before each of the first blocks; sentences of each class take the place of
`rest-of-phrase name .` Without prompts in the text, zero-shot CLIP's template. Images: prompts at the end of
the sequence, with new ones before each of the first blocks. With image features f (B, E) and text features t
(C, E):

    z = exp(logit_scale) f t^T                                          (B, C)

A `ConditionalHead` is CoCoOp's (Zhou et al., CVPR 2022), whose text has prompts p + h for an image with features
f (E,), so that its names are encoded anew for every image:

    h = A_2 relu(A_1 f + a_1) + a_2    with A_1 (E / 16, E), A_2 (Dt, E / 16)
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.classes import NAME, TEMPLATE, Texts, check_classnames, class_texts, rows_of
from dcp_zoo.backbone.clip import FrozenCLIP, WeightAndBias
from dcp_zoo.backbone.towers.text import TextChunks, prompted_text
from dcp_zoo.errors import ZooError, shorten
from dcp_zoo.heads.config import HeadConfig, own_names, without
from dcp_zoo.heads.fused import FusedClassifier
from dcp_zoo.heads.head import Head

CACHED = ("keys", "values", "alpha", "beta")  # tensors of a `CacheHead`, besides its weight


class LinearHead(Head):
    """A head whose own classifier is stored: weight (C, E) and bias (C,), by the features of a CLIP of which
    a method may have changed the towers. No text is encoded, except for the names of new classes. Nothing
    requires gradients. ZooError for a classifier of another shape.

    Args:
        clip, original: see `Head`.
        classnames: one name per class.
        weight, bias: of the logits, (C, E) and (C,).
        texts: for the names of new classes, or sentences of each class; "" if the method reads no names.
        changed: names of tensors in `clip.state_dict()`, which a checkpoint then holds.
    """

    kind = "linear"
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
        self._set_classes(check_classnames(classnames), texts)
        self.changed = list(changed)
        expected = (self.num_classes, clip.num_features)
        if (*weight.shape, *bias.shape) != (*expected, self.num_classes):
            found = f"{tuple(weight.shape)} with a bias {tuple(bias.shape)}"
            raise ZooError(f"The classifier must be {expected}, classes by features, not {found}.")
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", bias.detach())
        self.eval()

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "LinearHead":
        """The head of a checkpoint, by its `config.json` and its tensors' shapes, which `load_head` then
        loads."""
        names = own_names(config)
        known = clip.clip.state_dict()
        changed = [name for name in shapes if name in known]
        return cls(
            clip.with_clip(copy.deepcopy(clip.clip)) if changed else clip,
            names,
            torch.zeros(len(names), clip.num_features),
            torch.zeros(len(names)),
            texts=config["dcp"]["texts"],
            changed=changed,
            original=clip if changed else None,
        )

    def _method_linear(self) -> WeightAndBias:
        return self.weight, self.bias

    def _set_method_classes(self, names: list[str], texts: Texts) -> None:
        """The names of new classes are encoded; with other texts, those of all classes."""
        if isinstance(texts, str) and not self.texts:  # a template where no names are read
            texts = ""
        kept = self.method_classes if texts == self.texts else []
        new = [name for name, row in zip(names, rows_of(names, kept), strict=True) if row is None]
        weight = self.weight[: len(kept)]
        bias = self.bias[: len(kept)]
        if new:
            if not self.texts:
                problem = f"A head of {self.method} is limited to its classes, and reads no texts of {shorten(new, 5)}"
                raise ZooError(f"{problem}: use a head of dcp or zero-shot.")
            new_weight, new_bias = self.encoder.scaled(self.encoder.zero_shot_classifier(new, texts))
            weight = torch.cat([weight, new_weight])
            bias = torch.cat([bias, new_bias])
        rows = rows_of(names, [*kept, *new])
        self.weight = weight[rows]
        self.bias = bias[rows]
        self._set_classes(names, texts)

    def to_state(self) -> dict[str, Tensor]:
        state = self.encoder.clip.state_dict()
        return super().to_state() | {name: state[name] for name in self.changed}

    def load_trained(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        of_clip = {f"encoder.clip.{name}": state[name] for name in self.changed}
        super().load_trained(without(state, self.changed) | of_clip, path)


class Adapter(nn.Module):
    """f (B, E) -> f' / |f'| (B, E), see the module."""

    ratio: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, width // 4, bias=False)
        self.up = nn.Linear(width // 4, width, bias=False)
        self.register_buffer("ratio", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        changed = self.up(self.down(features).relu()).relu()
        return F.normalize(self.ratio * changed + (1 - self.ratio) * features, dim=-1)


class AdapterHead(LinearHead):
    """See the module; its arguments are those of `LinearHead`. Only its adapter, at first random, requires
    gradients, in training."""

    kind = "adapter"
    is_linear = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.adapter = Adapter(self.encoder.num_features).requires_grad_(False)

    def _classify(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.adapter(features.to(self.weight.dtype)), self.weight, self.bias)

    def _fused_classifier(self) -> FusedClassifier:
        if self.fc is not None:
            return super()._fused_classifier()
        return FusedClassifier(self.adapter, weight=self.weight, bias=self.bias)


class CacheHead(LinearHead):
    """See the module; its arguments are those of `LinearHead`, without a bias, and how many images it keeps,
    whose tensors are at first 0. Only the keys require gradients, in training."""

    kind = "cache"
    is_linear = False
    keys: Tensor
    values: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, clip: FrozenCLIP, classnames: Sequence[str], weight: Tensor, images: int) -> None:
        super().__init__(clip, classnames, weight, torch.zeros_like(weight[:, 0]))
        self.register_buffer("bias", self.bias, persistent=False)  # always 0
        classes, width = weight.shape
        for name, shape in zip(CACHED, ((images, width), (images, classes), (), ()), strict=True):
            self.register_buffer(name, weight.new_zeros(shape))

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "CacheHead":
        names = own_names(config)
        return cls(clip, names, torch.zeros(len(names), clip.num_features), len(shapes.get("keys", ())))

    def _classify(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.weight.dtype)
            return self.encoder.logits(features, self.weight) + self.alpha * self.cached(features, self.beta)

    def cached(self, features: Tensor, beta: float | Tensor) -> Tensor:
        """The logits of the training images, without alpha: features (B, E) -> (B, C)."""
        return (-beta * (1 - features @ self.keys.T)).exp() @ self.values

    def _set_method_classes(self, names: list[str], texts: Texts) -> None:
        """Among its own classes."""
        columns = rows_of(names, self.method_classes)
        super()._set_method_classes(names, self.texts)
        self.values = self.values[:, columns]


class PromptHead(Head):
    """See the module. Only the prompts, and what a method derives prompts from, ever require gradients.

    Args:
        clip, classnames: see `LinearHead`.
        text_prompts: (M, Dt) for each of the first text blocks; none for zero-shot CLIP's text.
        vision_prompts: (M, Dv) for each of the first vision blocks, see `FrozenCLIP.embed_prompts`.
        texts: what zero-shot CLIP reads of each class: a template, or sentences of each class.
        rest: of the phrase that initialised the text prompts, between them and the name.
    """

    kind = "prompts"
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
        self.text_prompts = nn.ParameterList(nn.Parameter(p) for p in text_prompts).to(self.device)
        self.vision_prompts = nn.ParameterList(nn.Parameter(p) for p in vision_prompts).to(self.device)
        self.name_tokens = None
        self.rest = rest
        self.template = f"{rest} {NAME}".strip() if self.text_prompts else TEMPLATE
        self._set_method_classes(check_classnames(classnames), texts)

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "PromptHead":
        """The head of a checkpoint, by its `config.json` and its tensors' shapes, which `load_head` then
        loads."""

        def prompts_of(tower: str) -> list[Tensor]:
            return [torch.zeros_like(t) for name, t in shapes.items() if name.startswith(f"{tower}_prompts.")]

        block = config["dcp"]
        text = prompts_of("text")
        vision = prompts_of("vision")
        head = cls(clip, own_names(config), text, vision, texts=block["texts"], rest=block["rest"])
        return head.requires_grad_(False)

    def _set_method_classes(self, names: list[str], texts: Texts) -> None:
        class_texts(names, texts)  # ZooError if a class has no sentences, before anything is changed
        if self.text_prompts:
            after_prompts = texts if isinstance(texts, Mapping) else self.template
            self.name_tokens = self.encoder.tokenize_names(names, len(self.text_prompts[0]), after_prompts)
        self._set_classes(names, texts)

    @torch.compiler.disable  # reads texts, and is kept
    def encode_text(self) -> Tensor:
        """Normalised features (C, E) of the class names; computed again when a weight changes, see
        `WeightCache`."""
        tensors = [*self.text_prompts, self.encoder.clip.logit_scale]
        return self._text_cache(self._encode_text, tensors, self.name_tokens, self.method_classes, self.texts)

    def _encode_text(self) -> Tensor:
        if self.name_tokens is None:
            return self.encoder.zero_shot_classifier(self.method_classes, self.texts)
        return prompted_text(self.encoder.text_tower, self.name_tokens, list(self.text_prompts))

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) that enter the first vision blocks."""
        return self.encoder.embed_prompts(list(self.vision_prompts))

    def _method_linear(self) -> WeightAndBias:
        return self.encoder.scaled(self.encode_text())

    @property
    def has_image_prompts(self) -> bool:
        return len(self.vision_prompts) > 0


class ConditionalHead(PromptHead):
    """See the module; its arguments are those of `PromptHead`, with one set of prompts, in the text."""

    kind = "conditional"
    is_linear = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        width = self.encoder.num_features
        layers = [nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, self.encoder.text_tower.width)]
        self.shift = nn.Sequential(*layers).to(self.device)

    def _classify(self, features: Tensor) -> Tensor:
        assert self.name_tokens is not None
        features = features.to(self.text_prompts[0].dtype)
        rows = []
        for image, shift in zip(features.split(1), self.shift(features).split(1), strict=True):
            prompts = [self.text_prompts[0] + shift]
            text = prompted_text(self.encoder.text_tower, self.name_tokens, prompts)
            rows.append(self.encoder.logits(image, text))
        return torch.cat(rows)
