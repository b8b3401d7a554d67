"""Shared by methods such as CoOp, VPT-deep and MaPLe: a frozen CLIP with learned prompts, trained like DCP."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dcp_zoo.model._cache import WeightCache
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import NAME, Texts, check_classnames, start_tokens
from dcp_zoo.model.towers.text import prompted_text
from dcp_zoo.training.evaluation import EVAL_BATCH, predict
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.sources import ImageSource

PROMPT_STD = 0.02  # of initial prompts, as in the papers


class PromptedCLIP(nn.Module):
    """A frozen CLIP with learned `prompts`, the only parameters that require gradients.

    A method defines how prompts enter a tower by overriding `image_prompts` or `encode_text`.
    """

    prompts: nn.ParameterList
    names: Any

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.clip: FrozenCLIP = task.clip
        self.progress, self.template = task.progress, task.template
        self.info: dict[str, Any] = {}
        self._cache = WeightCache()

    @property
    def visual(self) -> Any:
        return self.clip.visual

    def encode_image(self, images: torch.Tensor, patches: bool = False) -> torch.Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> normalised features (B, E)."""
        return self.clip.encode_prompted(images, self.clip.entering(self.image_prompts()), patches)

    def image_prompts(self) -> list[torch.Tensor]:
        """The prompts (M, Dv) for the first blocks of the image tower, see `FrozenCLIP.encode_prompted`."""
        return []

    def encode_text(self) -> torch.Tensor:
        """Normalised features (C, E) of the class names."""
        raise NotImplementedError

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        """See `Classifier.set_classnames`."""
        raise NotImplementedError

    def tokenize(self, names: Sequence[str], template: str = NAME) -> Any:
        """The template filled with each name, or the task's sentences of each class, in chunks, to follow the prompts;
        ZooError if one does not fit."""
        texts = template if isinstance(self.template, str) else self.template
        return self.clip.tokenize_names(names, len(self.prompts[0]), texts)

    def forward(self, inputs: torch.Tensor, patches: bool = False) -> torch.Tensor:
        """images (B, 3, H, W), with `patches` their patch maps, or features (B, E) of a frozen image tower -> logits
        (B, C)."""
        features = inputs if inputs.ndim == 2 else self.encode_image(inputs, patches)
        trained = (p for p in self.parameters() if p.requires_grad)
        return self.clip.logits(features, self._cache(self.encode_text, trained, self.names, self.template))

    @torch.no_grad()
    def linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Classifier.linear`."""
        return self.clip.scaled(self.encode_text())

    def logits(self, source: ImageSource) -> torch.Tensor:
        return predict(source.for_model(self), EVAL_BATCH, progress=self.progress)

    def fit(self, task: Task, source: ImageSource | None = None) -> "PromptedCLIP":
        """Train on the task's images, or on a source that replaces them."""
        source = source or task.train_images
        train(source.for_model(self), task.recipe, seed=task.seed, precision=task.precision, progress=task.progress)
        return self


class PhrasePrompts(PromptedCLIP):
    """Text prompts that may start from a phrase: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each
    of the first blocks. `rest` are the words of the phrase that stay before the class name. A task's sentences take the
    place of `rest-of-phrase name .`"""

    rest: str

    def start_from(self, phrase: str) -> str:
        """Initialise the first prompts with the embeddings of a phrase's first words, if it has enough of them, and
        return the remaining words, which stay before the class name."""
        words, n_ctx = phrase.split(), len(self.prompts[0])
        if len(words) >= n_ctx:
            ids = self.clip.tokenizer([phrase])[0, start_tokens(self.clip.tokenizer) :].to(self.clip.device)
            self.prompts[0].data.copy_(self.clip.text.token_embedding(ids[:n_ctx]))
        return " ".join(words[n_ctx:])

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.names = self.tokenize(check_classnames(classnames), f"{self.rest} {NAME}".strip())

    def encode_text(self) -> torch.Tensor:
        return prompted_text(self.clip.text_tower, self.names, list(self.prompts))


def init_prompts(count: int, n_ctx: int, width: int, device: torch.device) -> nn.ParameterList:
    """`count` sets of random prompts (n_ctx, width)."""
    return nn.ParameterList(nn.Parameter(torch.randn(n_ctx, width) * PROMPT_STD) for _ in range(count)).to(device)
