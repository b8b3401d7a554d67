"""Shared by methods such as CoOp, VPT-deep and MaPLe: a frozen CLIP with learned prompts, trained like DCP."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dcp_zoo.model._cache import WeightCache
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import NAME, Texts, check_classnames
from dcp_zoo.model.towers.text import prompted_text
from dcp_zoo.training.evaluation import EVAL_BATCH, predict
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.sources import ImageSource

PROMPT_STD = 0.02  # of initial prompts, as in the papers


class PromptedCLIP(nn.Module):
    """A frozen CLIP with learned prompts, the only parameters that require gradients.

    Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p of `prompts` before each of the first blocks. A
    task's sentences take the place of `rest-of-phrase name .` Images: `image_prompts`.

    Attributes:
        rest: the words of the phrase, if the prompts start from one, that stay before the class name.
    """

    prompts: nn.ParameterList
    names: Any
    rest = ""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.clip: FrozenCLIP = task.clip
        self.progress, self.template = task.progress, task.template
        self.info: dict[str, Any] = {}
        self._cache = WeightCache()

    @property
    def visual(self) -> Any:
        return self.clip.visual

    def start_from(self, phrase: str) -> None:
        """Initialise the first prompts with the embeddings of a phrase's first words, if it has enough of them; the
        others are the `rest`."""
        words, n_ctx = phrase.split(), len(self.prompts[0])
        if len(words) >= n_ctx:
            self.prompts[0].data.copy_(self.clip.embed_words(phrase, n_ctx))
        self.rest = " ".join(words[n_ctx:])

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        """See `Classifier.set_classnames`; ZooError if a text does not fit behind the prompts."""
        texts = f"{self.rest} {NAME}".strip() if isinstance(self.template, str) else self.template
        self.names = self.clip.tokenize_names(check_classnames(classnames), len(self.prompts[0]), texts)

    def encode_text(self) -> torch.Tensor:
        """Normalised features (C, E) of the class names."""
        return prompted_text(self.clip.text_tower, self.names, list(self.prompts))

    def image_prompts(self) -> list[torch.Tensor]:
        """The prompts (M, Dv) for the first blocks of the image tower, see `FrozenCLIP.entering`."""
        return []

    def encode_image(self, images: torch.Tensor, patches: bool = False) -> torch.Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> normalised features (B, E)."""
        return self.clip.encode_prompted(images, self.clip.entering(self.image_prompts()), patches)

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


def init_prompts(count: int, n_ctx: int, width: int, device: torch.device) -> nn.ParameterList:
    """`count` sets of random prompts (n_ctx, width)."""
    return nn.ParameterList(nn.Parameter(torch.randn(n_ctx, width) * PROMPT_STD) for _ in range(count)).to(device)
