"""PromptSRC (Khattak et al., ICCV 2023): independent prompts in both towers, regularised towards frozen CLIP and
averaged over epochs.

Prompts enter the first blocks of each tower as in MaPLe, except that the vision prompts are learned directly instead of
mapped from the text prompts. With prompted features f (B, E) of images and t (C, E) of class names, frozen CLIP's f'
and t', all normalised, and s = exp(logit_scale):

    loss = cross-entropy of s f t^T + 25 mean |t - t'| + 10 mean |f - f'|
           + KL(softmax(s f' t'^T) || softmax(s f t^T)) / (B C)

t' averages 60 prompt templates, the first of CLIP's 80 for ImageNet. The final prompts are the average of those after
each epoch e = 1 .. T, with Gaussian weights

    exp(-((e - mean T) / (std T))^2 / 2), normalised to a sum of 1.

No model selection. For few-shot, the authors use one Gaussian for six datasets and another for the other five; here the
first serves for all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.training.loop import EpochAverage
from dcp_zoo.training.methods.base import Method, Task, train_prompts
from dcp_zoo.training.methods.prompts import new_head, random_prompts, start_from
from dcp_zoo.training.recipes import TrainingRecipe, changed, count, option

TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES[:60])


@dataclass(frozen=True)
class PromptSRCRecipe(TrainingRecipe):
    lr: float = changed(TrainingRecipe, "lr", 0.0025)
    epochs: int | None = changed(TrainingRecipe, "epochs", 50)
    n_ctx: int = count(4, "prompt tokens in a block of each tower")
    depth: int = count(9, "blocks of each tower with new prompts; at most the blocks of the shorter tower")
    ctx_init: str = option("a photo of a", "words before the class name that initialise the first text prompts")
    text_weight: float = option(25.0, "weight of the L1 distance between prompted and frozen text features")
    image_weight: float = option(10.0, "weight of the L1 distance between prompted and frozen image features")
    average_mean: float = option(0.6, "centre of the Gaussian over epochs, as a fraction of their number")
    average_std: float = option(0.6, "its standard deviation, likewise")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "PromptSRCRecipe":
        # the authors': a late, narrow Gaussian for base-to-new; an early, wide one for transfer from ImageNet
        if protocol in ("cross-dataset", "domain-shift"):
            return cls(epochs=20, depth=3, average_mean=0.3, average_std=0.5)
        return cls(epochs=20, average_mean=0.75, average_std=0.05) if protocol == "base-to-new" else cls()


def fit(task: Task) -> PromptHead:
    towers, recipe = (task.clip.text_tower, task.clip.vision_tower), task.recipe
    depth = min(recipe.depth, *(len(tower.blocks) for tower in towers))
    text, vision = (random_prompts(depth, recipe.n_ctx, tower.width) for tower in towers)
    text, rest = start_from(task.clip, text, recipe.ctx_init)
    head = new_head(task, text, vision, rest)
    weights = epoch_weights(recipe.epochs, recipe.average_mean, recipe.average_std, recipe.num_epochs)
    frozen = ensemble(task.clip, task.classnames, task.texts)
    loss_of = promptsrc_loss(head, frozen, recipe)
    average = EpochAverage([p for p in head.parameters() if p.requires_grad], weights)
    train_prompts(task, head, task.train_images, loss_of=loss_of, average=average)
    return head.requires_grad_(False)


def promptsrc_loss(
    head: PromptHead, frozen_text: Tensor, recipe: PromptSRCRecipe
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The loss of images and labels (B,), given t' (C, E), and the cross-entropy alone."""

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        prompted = head.encode_image(inputs), head.encode_text()
        with torch.no_grad():
            frozen = head.encoder.encode_image(inputs), frozen_text
        logits, frozen_logits = (head.encoder.logits(*pair).float() for pair in (prompted, frozen))
        distances = [(a - b).abs().mean() for a, b in zip(prompted, frozen, strict=True)]
        change = F.kl_div(logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="sum", log_target=True)
        own = F.cross_entropy(logits, labels)
        total = own + change / logits.numel()
        return total + recipe.image_weight * distances[0] + recipe.text_weight * distances[1], own

    return loss_of


@torch.no_grad()
def ensemble(clip: FrozenCLIP, classnames: Sequence[str], texts: Texts = "") -> Tensor:
    """Text features t' (C, E), averaged over all templates and normalised; or of `texts`, if these are sentences."""
    templates = TEMPLATES if isinstance(texts, str) else [texts]
    features = [clip.encode_sentences(classnames, template) for template in templates]
    return F.normalize(torch.stack(features).mean(0), dim=-1)


def epoch_weights(epochs: int, mean: float, std: float, run: int | None = None) -> list[float]:
    """Gaussian weights of epochs 1 .. `run`, with a sum of 1; mean and std are fractions of `epochs`."""
    exponents = [-(((e / epochs - mean) / std) ** 2) / 2 for e in range(1, (run or epochs) + 1)]
    weights = [math.exp(exponent - max(exponents)) for exponent in exponents]  # the largest is 1
    return [weight / sum(weights) for weight in weights]


PAPER = "Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023"
PROMPTSRC = Method("promptsrc", "PromptSRC", PAPER, fit, PromptSRCRecipe)
