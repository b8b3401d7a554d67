"""PromptSRC (Khattak et al., Self-regulating Prompts, ICCV 2023): independent prompts in both towers, regularised
towards frozen CLIP and averaged over epochs.

Prompts enter the first blocks of each tower as in MaPLe, except that the vision prompts are learned directly instead
of mapped from the text prompts. With prompted features f (B, E) of images and t (C, E) of class names, frozen CLIP's
f' and t', all normalised, and s = exp(logit_scale):

    loss = cross-entropy of s f t^T + 25 mean |t - t'| + 10 mean |f - f'|
           + KL(softmax(s f' t'^T) || softmax(s f t^T)) / (B C)

t' averages 60 prompt templates, the first of CLIP's 80 for ImageNet. The final prompts are the average of those after
each epoch e = 1 .. T, with Gaussian weights

    exp(-((e - mean T) / (std T))^2 / 2), normalised to a sum of 1.

No model selection. For few-shot, the authors use one Gaussian for six datasets and another for the other five; here
the first serves for all.
"""

import math
from collections.abc import Sequence

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch.nn import functional as F

from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.prompts import PromptedCLIP, init_prompts
from dcp_zoo.training.methods.recipes import PromptSRCRecipe
from dcp_zoo.training.methods.tuning import shuffled, train_epochs
from dcp_zoo.training.recipes import batch_sizes
from dcp_zoo.training.sources import ImageSource

TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES[:60])


class PromptSRC(PromptedCLIP):
    """`prompts` (M, Dt) of the text tower and `vision_prompts` (M, Dv) of the vision tower, one set per block."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        towers, recipe = (self.clip.text_tower, self.clip.vision_tower), task.recipe
        depth = min(recipe.depth, *(len(tower.blocks) for tower in towers))
        self.prompts, self.vision_prompts = (
            init_prompts(depth, recipe.n_ctx, tower.width, task.clip.device) for tower in towers
        )
        self.start_from(recipe.ctx_init)
        self.set_classnames(task.classnames)

    def image_prompts(self) -> list[torch.Tensor]:
        return list(self.vision_prompts)

    def fit(self, task: Task, source: ImageSource | None = None) -> "PromptSRC":
        """Train, and replace the prompts by their weighted average over epochs."""
        recipe, source = task.recipe, source or task.train_images
        frozen, patches = ensemble(task.clip, task.classnames, task.template), source.patches
        trained = [p for p in self.parameters() if p.requires_grad]
        per_epoch = len(batch_sizes(len(source.items), recipe.batch_size, recipe.drop_last))
        mean = [torch.zeros_like(p) for p in trained]
        weights = epoch_weights(recipe.epochs, recipe.average_mean, recipe.average_std, recipe.num_epochs)

        def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
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
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        frozen_text: torch.Tensor,
        recipe: PromptSRCRecipe,
        patches: bool = False,
    ) -> torch.Tensor:
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
def ensemble(clip: FrozenCLIP, classnames: Sequence[str], texts: Texts = "") -> torch.Tensor:
    """Text features t' (C, E), averaged over all templates and normalised; or of `texts`, if these are sentences."""
    templates = TEMPLATES if isinstance(texts, str) else [texts]
    found = [clip.encode_sentences(classnames, template) for template in templates]
    return F.normalize(torch.stack(found).mean(0), dim=-1)


def epoch_weights(epochs: int, mean: float, std: float, run: int | None = None) -> list[float]:
    """Gaussian weights of epochs 1 .. `run`, with a sum of 1; mean and std are fractions of `epochs`."""
    exponents = [-(((e / epochs - mean) / std) ** 2) / 2 for e in range(1, (run or epochs) + 1)]
    weights = [math.exp(exponent - max(exponents)) for exponent in exponents]  # the largest is 1
    return [weight / sum(weights) for weight in weights]


def fit(task: Task) -> PromptSRC:
    return PromptSRC(task).fit(task)
