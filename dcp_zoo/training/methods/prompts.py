"""A frozen CLIP with learned prompts, trained like DCP, and three methods that differ in where the prompts are:

- CoOp (Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022): in the text, before the name.
- VPT-deep (Jia et al., Visual Prompt Tuning, ECCV 2022), in the setting of MaPLe's comparison: in the image.
- MaPLe (Khattak et al., Multi-modal Prompt Learning, CVPR 2023): in both, those of the image mapped from the text's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dcp_zoo.model._torch import WeightCache
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import NAME, Texts, check_classnames
from dcp_zoo.model.towers.text import prompted_text
from dcp_zoo.training.evaluation import EVAL_BATCH, predict
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Task, feature_view, frozen_features
from dcp_zoo.training.sources import ImageSource

PROMPT_STD = 0.02  # of initial prompts, as in the papers


class PromptedCLIP(nn.Module):
    """A frozen CLIP with learned prompts, the only parameters that require gradients. Text: `[SOS] p_1 .. p_M
    rest-of-phrase name . [EOT]`, with new p of `prompts` before each of the first blocks; a task's sentences take the
    place of `rest-of-phrase name .` Images: `image_prompts`."""

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


# -------------------------------------------------------------------------------------------------------- three methods


class CoOp(PromptedCLIP):
    """Text: `[SOS] p_1 .. p_M name . [EOT]`, the same learned p for every class. Images: plain CLIP."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.prompts = init_prompts(1, task.recipe.n_ctx, self.clip.text_tower.width, task.clip.device)
        self.set_classnames(task.classnames)

    @torch.no_grad()
    def logits(self, source: ImageSource) -> torch.Tensor:
        features = frozen_features(self.clip, source, self.progress)[0]
        return self(features.to(self.clip.device)).cpu()


class VPT(PromptedCLIP):
    """Images: prompts at the end of the sequence, with new ones for every block. Text: as in zero-shot CLIP."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        tower = self.clip.vision_tower
        depth = min(task.recipe.depth, len(tower.blocks))
        self.prompts = init_prompts(depth, task.recipe.n_ctx, tower.width, task.clip.device)
        self.set_classnames(task.classnames)

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.template = template or self.template
        self.names = check_classnames(classnames)
        self.text_features = self.clip.zero_shot_classifier(self.names, self.template)

    def encode_text(self) -> torch.Tensor:
        return self.text_features

    def image_prompts(self) -> list[torch.Tensor]:
        return list(self.prompts)


class MaPLe(PromptedCLIP):
    """Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each of the first blocks.
    Vision: the same at the end of the sequence, the prompts of block i being a linear map F_i of the text tower's."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        text, vision, recipe = self.clip.text_tower, self.clip.vision_tower, task.recipe
        depth = min(recipe.depth, len(text.blocks), len(vision.blocks))
        self.prompts = init_prompts(depth, recipe.n_ctx, text.width, task.clip.device)
        self.couplings = nn.ModuleList(nn.Linear(text.width, vision.width) for _ in range(depth)).to(task.clip.device)
        self.start_from(recipe.ctx_init)
        self.set_classnames(task.classnames)

    def image_prompts(self) -> list[torch.Tensor]:
        return [coupling(p) for coupling, p in zip(self.couplings, self.prompts, strict=True)]


def fit_coop(task: Task) -> PromptedCLIP:
    return CoOp(task).fit(task, feature_view(task))


def fit_vpt(task: Task) -> PromptedCLIP:
    return VPT(task).fit(task)


def fit_maple(task: Task) -> PromptedCLIP:
    return MaPLe(task).fit(task)
