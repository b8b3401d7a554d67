"""A frozen CLIP with learned prompts, and four methods that differ in where the prompts are:

- CoOp (Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022): in the text, before the name.
- VPT-deep (Jia et al., Visual Prompt Tuning, ECCV 2022), in the setting of MaPLe's comparison: in the image.
- MaPLe (Khattak et al., Multi-modal Prompt Learning, CVPR 2023): in both, those of the image mapped from the text's.
- PromptSRC: in both.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.model._torch import WeightCache
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import NAME, Texts, check_classnames
from dcp_zoo.model.towers.text import prompted_text
from dcp_zoo.training.evaluation import EVAL_BATCH, predict
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Task, feature_view, frozen_features, shuffled, train_epochs
from dcp_zoo.training.methods.recipes import PromptSRCRecipe
from dcp_zoo.training.recipes import batch_sizes
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

    def start_from(self, phrase: str) -> None:
        """Initialise the first prompts with a phrase's first words, if it has enough; the others are the `rest`."""
        words, n_ctx = phrase.split(), len(self.prompts[0])
        if len(words) >= n_ctx:
            self.prompts[0].data.copy_(self.clip.embed_words(phrase, n_ctx))
        self.rest = " ".join(words[n_ctx:])

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        """See `Classifier.set_classnames`; ZooError if a text does not fit behind the prompts."""
        texts = f"{self.rest} {NAME}".strip() if isinstance(self.template, str) else self.template
        self.names = self.clip.tokenize_names(check_classnames(classnames), len(self.prompts[0]), texts)

    def encode_text(self) -> Tensor:
        """Normalised features (C, E) of the class names."""
        return prompted_text(self.clip.text_tower, self.names, list(self.prompts))

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) for the first blocks of the image tower, see `FrozenCLIP.entering`."""
        return []

    def encode_image(self, images: Tensor, patches: bool = False) -> Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> normalised features (B, E)."""
        return self.clip.encode_prompted(images, self.clip.entering(self.image_prompts()), patches)

    def forward(self, inputs: Tensor, patches: bool = False) -> Tensor:
        """images (B, 3, H, W), their patch maps, or features (B, E) of a frozen tower -> logits (B, C)."""
        features = inputs if inputs.ndim == 2 else self.encode_image(inputs, patches)
        trained = (p for p in self.parameters() if p.requires_grad)
        return self.clip.logits(features, self._cache(self.encode_text, trained, self.names, self.template))

    @torch.no_grad()
    def linear(self) -> tuple[Tensor, Tensor]:
        """See `Classifier.linear`."""
        return self.clip.scaled(self.encode_text())

    def logits(self, source: ImageSource) -> Tensor:
        return predict(source.for_model(self), EVAL_BATCH, progress=self.progress)

    def images(self, task: Task) -> ImageSource:
        return task.train_images

    def fit(self, task: Task) -> "PromptedCLIP":
        source = self.images(task)
        train(source.for_model(self), task.recipe, seed=task.seed, precision=task.precision, progress=task.progress)
        return self


def init_prompts(count: int, n_ctx: int, width: int, device: torch.device) -> nn.ParameterList:
    """`count` sets of random prompts (n_ctx, width)."""
    return nn.ParameterList(nn.Parameter(torch.randn(n_ctx, width) * PROMPT_STD) for _ in range(count)).to(device)


class CoOp(PromptedCLIP):
    """Text: `[SOS] p_1 .. p_M name . [EOT]`, the same learned p for every class. Images: plain CLIP."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.prompts = init_prompts(1, task.recipe.n_ctx, self.clip.text_tower.width, task.clip.device)
        self.set_classnames(task.classnames)

    def images(self, task: Task) -> ImageSource:
        return feature_view(task)

    @torch.no_grad()
    def logits(self, source: ImageSource) -> Tensor:
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

    def encode_text(self) -> Tensor:
        return self.text_features

    def image_prompts(self) -> list[Tensor]:
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

    def image_prompts(self) -> list[Tensor]:
        return [coupling(p) for coupling, p in zip(self.couplings, self.prompts, strict=True)]


TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES[:60])


class PromptSRC(PromptedCLIP):
    """PromptSRC (Khattak et al., Self-regulating Prompts, ICCV 2023): independent prompts in both towers, regularised
    towards frozen CLIP and averaged over epochs.

    Prompts enter the first blocks of each tower as in MaPLe, except that the vision prompts are learned directly
    instead of mapped from the text prompts. With prompted features f (B, E) of images and t (C, E) of class names,
    frozen CLIP's f' and t', all normalised, and s = exp(logit_scale):

        loss = cross-entropy of s f t^T + 25 mean |t - t'| + 10 mean |f - f'|
               + KL(softmax(s f' t'^T) || softmax(s f t^T)) / (B C)

    t' averages 60 prompt templates, the first of CLIP's 80 for ImageNet. The final prompts are the average of those
    after each epoch e = 1 .. T, with Gaussian weights

        exp(-((e - mean T) / (std T))^2 / 2), normalised to a sum of 1.

    No model selection. For few-shot, the authors use one Gaussian for six datasets and another for the other five; here
    the first serves for all. `prompts` (M, Dt) are those of the text tower and `vision_prompts` (M, Dv) of the vision
    tower, one set per block.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        towers, recipe = (self.clip.text_tower, self.clip.vision_tower), task.recipe
        depth = min(recipe.depth, *(len(tower.blocks) for tower in towers))
        self.prompts, self.vision_prompts = (
            init_prompts(depth, recipe.n_ctx, tower.width, task.clip.device) for tower in towers
        )
        self.start_from(recipe.ctx_init)
        self.set_classnames(task.classnames)

    def image_prompts(self) -> list[Tensor]:
        return list(self.vision_prompts)

    def fit(self, task: Task) -> "PromptSRC":
        """Train, and replace the prompts by their weighted average over epochs."""
        recipe, source = task.recipe, self.images(task)
        frozen, patches = ensemble(task.clip, task.classnames, task.template), source.patches
        trained = [p for p in self.parameters() if p.requires_grad]
        per_epoch = len(batch_sizes(len(source.items), recipe.batch_size, recipe.drop_last))
        mean = [torch.zeros_like(p) for p in trained]
        weights = epoch_weights(recipe.epochs, recipe.average_mean, recipe.average_std, recipe.num_epochs)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            return self.loss(images, labels, frozen, recipe, patches)

        def add_epoch(step: int) -> None:
            if (step + 1) % per_epoch == 0:
                for total, p in zip(mean, trained, strict=True):
                    total.add_(p.detach(), alpha=weights[step // per_epoch])

        batches = shuffled(source, recipe.batch_size, task.seed, recipe.drop_last)
        self.train()
        train_epochs(task, trained, loss, batches, per_epoch, add_epoch)
        with torch.no_grad():
            for p, total in zip(trained, mean, strict=True):
                p.copy_(total)
        return self.eval()

    def loss(
        self, images: Tensor, labels: Tensor, frozen_text: Tensor, recipe: PromptSRCRecipe, patches: bool = False
    ) -> Tensor:
        """The loss for images (B, 3, H, W), or with `patches` their patch maps, labels (B,), and t' (C, E)."""
        prompted = self.encode_image(images, patches), self.encode_text()
        with torch.no_grad():
            frozen = self.clip.encode_image(images, patches=patches), frozen_text
        logits, frozen_logits = (self.clip.logits(*pair).float() for pair in (prompted, frozen))
        distances = [(a - b).abs().mean() for a, b in zip(prompted, frozen, strict=True)]
        change = F.kl_div(logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="sum", log_target=True)
        total = F.cross_entropy(logits, labels) + change / logits.numel()
        return total + recipe.image_weight * distances[0] + recipe.text_weight * distances[1]


@torch.no_grad()
def ensemble(clip: FrozenCLIP, classnames: Sequence[str], texts: Texts = "") -> Tensor:
    """Text features t' (C, E), averaged over all templates and normalised; or of `texts`, if these are sentences."""
    templates = TEMPLATES if isinstance(texts, str) else [texts]
    found = [clip.encode_sentences(classnames, template) for template in templates]
    return F.normalize(torch.stack(found).mean(0), dim=-1)


def epoch_weights(epochs: int, mean: float, std: float, run: int | None = None) -> list[float]:
    """Gaussian weights of epochs 1 .. `run`, with a sum of 1; mean and std are fractions of `epochs`."""
    exponents = [-(((e / epochs - mean) / std) ** 2) / 2 for e in range(1, (run or epochs) + 1)]
    weights = [math.exp(exponent - max(exponents)) for exponent in exponents]  # the largest is 1
    return [weight / sum(weights) for weight in weights]


def fitted(kind: type[PromptedCLIP]) -> Callable[[Task], PromptedCLIP]:
    return lambda task: kind(task).fit(task)


fit_coop, fit_vpt, fit_maple, fit_promptsrc = map(fitted, (CoOp, VPT, MaPLe, PromptSRC))
