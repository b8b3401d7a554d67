"""A head with learned prompts in one or both towers that do not rewrite each other: of CoOp, VPT, MaPLe, PromptSRC.

Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new prompts p before each of the first blocks; sentences of
each class take the place of `rest-of-phrase name .` Without prompts in the text, zero-shot CLIP's template.
Images: prompts at the end of the sequence, with new ones before each of the first blocks.

With image features f (B, E) and text features t (C, E):

    z = exp(logit_scale) f t^T                                      (B, C)
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dcp_zoo.backbone._torch import WeightCache
from dcp_zoo.backbone.classes import NAME, TEMPLATE, Class, Texts, check_classnames, class_texts, matched, read_of
from dcp_zoo.backbone.clip import FrozenCLIP, Linear, Reading
from dcp_zoo.backbone.inputs import Images
from dcp_zoo.backbone.towers.text import TextChunks, prompted_text
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import HeadConfig, own_names
from dcp_zoo.heads.head import Head


class PromptHead(Head):
    """See the module. Only the prompts, and what a method derives prompts from, ever require gradients.

    Args:
        clip, classnames: see `LinearHead`.
        text_prompts: (M, Dt) for each of the first text blocks; none for zero-shot CLIP's text.
        vision_prompts: (M, Dv) for each of the first vision blocks, see `FrozenCLIP.entering`.
        texts: what zero-shot CLIP reads of each class: a template, or sentences of each class.
        rest: of the phrase that initialised the text prompts, between them and the name.
    """

    kind, trained = "prompts", ("text_prompts.", "vision_prompts.")
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
        self._classify_into(matched(check_classnames(classnames)), texts)

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

    def _classify_into(self, classes: list[Class], texts: Texts | None) -> None:
        texts = TEMPLATE if isinstance(texts, Mapping) and not texts else texts
        names, now = read_of(classes), texts or self.texts
        class_texts(names, now)  # ZooError if a class has no sentences, before anything is changed
        if self.text_prompts:
            behind = now if isinstance(now, Mapping) else self.template
            self.name_tokens = self.encoder.tokenize_names(names, len(self.text_prompts[0]), behind)
        self._keep(classes, now)

    def encode_text(self) -> Tensor:
        """Normalised features (C, E) of the class names."""
        if self.name_tokens is None:
            return self.encoder.zero_shot_classifier(read_of(self.named), self.texts)
        tower = self.encoder.text_tower
        return prompted_text(tower, self.name_tokens, list(self.text_prompts), self._checkpointed)

    @torch.compiler.disable  # reads texts, and is kept
    def _text_linear(self) -> Linear:
        tensors = [*self.text_prompts, self.encoder.clip.logit_scale]
        depends_on = self.name_tokens, read_of(self.named), self.texts
        return self.encoder.scaled(self._cache(self.encode_text, tensors, *depends_on))

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) that enter the first vision blocks."""
        return self.encoder.entering(list(self.vision_prompts))

    def _own_reading(self) -> Reading:
        if not self._prompts_images:
            return Reading(self.encoder, self.encoder.widths, self.encoder.read, self._text_linear)
        return Reading(self.encoder, self.encoder.widths[:1], self._encode_own, self._text_linear, self.image_prompts)

    @property
    def _prompts_images(self) -> bool:
        """Whether there are prompts in the image tower, without computing them."""
        return len(self.vision_prompts) > 0

    @property
    def num_image_prompts(self) -> int:
        return len([*self.vision_prompts, *self.text_prompts][0]) if self._prompts_images else 0

    def _encode_own(self, images: Images) -> Tensor:
        return self.encoder.encode_image(images, self.image_prompts(), run=self._checkpointed)

    def method_config(self) -> tuple[Values, Values]:
        return {}, {"head": self.kind, "rest": self.rest}
