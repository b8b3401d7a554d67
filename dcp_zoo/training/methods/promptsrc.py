"""PromptSRC (Khattak et al., ICCV 2023): independent prompts in both towers, regularised towards frozen CLIP
and averaged over epochs.

Prompts are those of IVLP, in the first blocks of each tower. With prompted features f (B, E) of images and t
(C, E) of class names, frozen CLIP's f' and t', all normalised, and s = exp(logit_scale):

    loss = cross-entropy of s f t^T + 25 mean |t - t'| + 10 mean |f - f'|
           + KL(softmax(s f' t'^T) || softmax(s f t^T)) / (B C)

t' averages 60 prompt templates, the first of CLIP's 80 for ImageNet. The final prompts are the average of
those after each epoch e = 1 .. T, with Gaussian weights

    exp(-((e - mean T) / (std T))^2 / 2), normalised to a sum of 1.

No model selection. For few-shot, the authors use one Gaussian for six datasets and another for the other
five; here the first serves for all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.training.loop import Loss, train
from dcp_zoo.training.methods.base import Method
from dcp_zoo.training.methods.prompts import IndependentRecipe, independent_prompts
from dcp_zoo.training.recipes import TrainingRecipe, changed, option
from dcp_zoo.training.task import Task

TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES[:60])


@dataclass(frozen=True)
class PromptSRCRecipe(IndependentRecipe):
    epochs: int | None = changed(TrainingRecipe, "epochs", 50)
    text_weight: float = option(25.0, "weight of the L1 distance between prompted and frozen text features")
    image_weight: float = option(10.0, "weight of the L1 distance between prompted and frozen image features")
    average_mean: float = option(0.6, "centre of the Gaussian over epochs, as a fraction of their number")
    average_std: float = option(0.6, "its standard deviation, likewise")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "PromptSRCRecipe":
        # the authors': a late, narrow Gaussian for base-to-new; an early, wide one for transfer from
        # ImageNet
        if protocol in ("cross-dataset", "domain-shift"):
            return cls(epochs=20, depth=3, average_mean=0.3, average_std=0.5)
        if protocol == "base-to-new":
            return cls(epochs=20, average_mean=0.75, average_std=0.05)
        return cls()


def fit(task: Task) -> PromptHead:
    recipe: PromptSRCRecipe = task.recipe
    head = independent_prompts(task)
    assert recipe.epochs is not None
    weights = epoch_weights(recipe.epochs, recipe.average_mean, recipe.average_std, recipe.num_epochs)
    loss_of = promptsrc_loss(head, ensemble(task.clip, task.classnames, task.texts), recipe)
    train(task, head, loss_of=loss_of, epoch_weights=weights)
    return head.requires_grad_(False)


def promptsrc_loss(head: PromptHead, frozen_text: Tensor, recipe: PromptSRCRecipe) -> Loss:
    """The loss of images and labels (B,), given t' (C, E), see the module; reported is the cross-entropy
    alone."""
    clip = head.encoder

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = head.encode_image(inputs)
        text = head.encode_text()
        with torch.no_grad():
            frozen_features = clip.encode_image(inputs)
        logits = clip.logits(features, text).float()
        frozen_logits = clip.logits(frozen_features, frozen_text).float()
        divergence = F.kl_div(logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="sum", log_target=True)
        image_distance = (features - frozen_features).abs().mean()
        text_distance = (text - frozen_text).abs().mean()
        cross_entropy = F.cross_entropy(logits, labels)
        total = cross_entropy + divergence / logits.numel()
        return total + recipe.image_weight * image_distance + recipe.text_weight * text_distance, cross_entropy

    return loss_of


@torch.no_grad()
def ensemble(clip: FrozenCLIP, classnames: Sequence[str], texts: Texts = "") -> Tensor:
    """Text features t' (C, E), averaged over all templates and normalised; or of `texts`, if these are
    sentences."""
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
