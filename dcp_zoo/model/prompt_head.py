"""A head with learned prompts in one or both towers that do not rewrite each other: of CoOp, VPT, MaPLe, PromptSRC.

Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new prompts p before each of the first blocks; sentences of
each class take the place of `rest-of-phrase name .` Without prompts in the text, zero-shot CLIP's template.
Images: prompts at the end of the sequence, with new ones before each of the first blocks.

With image features f (B, E) and text features t (C, E):

    z = exp(logit_scale) f t^T                                      (B, C)
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcp_zoo.model._torch import WeightCache
from dcp_zoo.model.config import HeadConfig
from dcp_zoo.model.head import Head
from dcp_zoo.model.names import NAME, Texts, Tokenizer, as_sentences, check_classnames, class_texts, saved_texts
from dcp_zoo.model.text_probe import Linear
from dcp_zoo.model.towers.text import prompted_text


class PromptHead(Head):
    """See the module. Only the prompts, and what a method derives prompts from, ever require gradients.

    Args:
        clip, classnames, tokenizer: as of a `DCP`.
        text_prompts: (M, Dt) for each of the first text blocks; none for zero-shot CLIP's text.
        vision_prompts: (M, Dv) for each of the first vision blocks, see `FrozenCLIP.entering`.
        template: what zero-shot CLIP reads of each class: a template, or sentences of each class.
        rest: of the phrase that initialised the text prompts, between them and the name.
    """

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        text_prompts: Iterable[Tensor] = (),
        vision_prompts: Iterable[Tensor] = (),
        *,
        template: Texts,
        rest: str = "",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(clip, tokenizer)
        self.text_prompts, self.vision_prompts = (
            nn.ParameterList(nn.Parameter(p) for p in prompts).to(self.device)
            for prompts in (text_prompts, vision_prompts)
        )
        self.template, self.rest = template, rest
        self._cache = WeightCache()
        self.set_classnames(classnames)

    @classmethod
    def from_config(
        cls, clip: nn.Module, config: HeadConfig, shapes: Mapping[str, Tensor], tokenizer: Tokenizer | None
    ) -> "PromptHead":
        in_order = sorted(shapes, key=lambda name: (len(name), name))  # 9 before 10
        prompts: dict[str, list[Tensor]] = {
            tower: [torch.zeros(shapes[name].shape) for name in in_order if name.startswith(tower)]
            for tower in ("text_prompts.", "vision_prompts.")
        }
        block = config["dcp"]
        texts: dict[str, Any] = {"template": block["template"], "rest": block["rest"]}
        return cls(clip, config["label_names"], *prompts.values(), **texts, tokenizer=tokenizer).requires_grad_(False)

    @property
    def n_ctx(self) -> int:  # type: ignore[override]
        """M in the image tower."""
        prompts = self.image_prompts()
        return len(prompts[0]) if prompts else 0

    @property
    def is_prompted(self) -> bool:
        return bool(self.image_prompts())

    @property
    def texts(self) -> Texts:
        return self.template

    def set_classnames(self, classnames: Sequence[str], texts: Texts | None = None) -> None:
        names, template = check_classnames(classnames), texts or self.template
        class_texts(names, template)  # ZooError if a class has no sentences, before anything is changed
        self.name_tokens = None
        if self.text_prompts:
            self.name_tokens = self.tokenize_names(names, len(self.text_prompts[0]), self._behind(template))
        self.rely_on_texts(template, self.template)
        self.classnames, self.num_classes, self.template = names, len(names), template

    def _behind(self, template: Texts) -> Texts:
        """What follows the text prompts, for a template or sentences of zero-shot CLIP."""
        return template if isinstance(template, Mapping) else f"{self.rest} {NAME}".strip()

    def keep_texts(self, name: str, new: str) -> None:
        texts = as_sentences(self.classnames, self._behind(self.template) if self.text_prompts else self.template)
        self.template = {new if known == name else known: own for known, own in texts.items()}

    def encode_text(self) -> Tensor:
        """Normalised features (C, E) of the class names."""
        if not self.text_prompts:
            return self.zero_shot_classifier(self.classnames, self.template)
        return prompted_text(self.text_tower, self.name_tokens, list(self.text_prompts), self._checkpointed)

    def own_linear(self) -> Linear:
        tensors = [*self.text_prompts, self.clip.logit_scale]
        return self.scaled(self._cache(self.encode_text, tensors, self.name_tokens, self.classnames, self.template))

    def image_prompts(self) -> list[Tensor]:
        return self.entering(list(self.vision_prompts))

    def encode_own(self, images: Tensor, patches: bool = False) -> Tensor:
        return self.encode_prompted(images, self.image_prompts(), patches, self._checkpointed)

    def trained_state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if not name.startswith("clip.")}

    def method_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        texts = saved_texts(self.classnames, self.template)
        return {}, {"head": "prompts", "method": self.method, "template": texts, "rest": self.rest}
