"""Successors of CoOp, which also learn prompts in the text alone, for any image tower: CoCoOp, KgCoOp
and ProGrad.

With image features f (B, E), text features t (C, E) with prompts and t' of zero-shot CLIP, all normalised, and
s = exp(logit_scale).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.heads.config import PHRASE, Abilities
from dcp_zoo.heads.kinds import ConditionalHead, PromptHead
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Method
from dcp_zoo.training.methods.prompts import CoOpRecipe, IndependentRecipe, new_head, random_prompts, start_from
from dcp_zoo.training.recipes import TrainingRecipe, changed, count, option
from dcp_zoo.training.task import Task

# ------------------------------------------------------------------------------------------------------------- CoCoOp


@dataclass(frozen=True)
class CoCoOpRecipe(TrainingRecipe):
    """The authors' for ViT-B/16, the same in all of their protocols."""

    lr: float = changed(TrainingRecipe, "lr", 0.002)
    batch_size: int = changed(TrainingRecipe, "batch_size", 1)
    epochs: int | None = changed(TrainingRecipe, "epochs", 10)
    n_ctx: int = count(4, "prompt tokens")
    ctx_init: str = changed(IndependentRecipe, "ctx_init", PHRASE)


def fit_cocoop(task: Task) -> ConditionalHead:
    """CoCoOp: CoOp whose prompts are shifted by a network that reads the image's features.

    Text: `[SOS] p_1 + h .. p_M + h rest-of-phrase name . [EOT]`, with p at first the phrase's first words and the
    shift h of `ConditionalHead`. Images: plain CLIP.
    """
    prompts, rest = phrase_prompts(task)
    head = ConditionalHead(task.clip, task.classnames, prompts, texts=task.texts, rest=rest)
    train(task, head, task.feature_loader())
    return head.requires_grad_(False)


def phrase_prompts(task: Task) -> tuple[list[Tensor], str]:
    """The prompts before training, and what follows them of the phrase."""
    prompts = random_prompts(1, task.recipe.n_ctx, task.clip.text_tower.width)
    return start_from(task.clip, prompts, task.recipe.ctx_init)


# ------------------------------------------------------------------------------------------------------------- KgCoOp


@dataclass(frozen=True)
class KgCoOpRecipe(CoCoOpRecipe):
    """The authors' for ViT-B/16, the same in all of their protocols."""

    batch_size: int = changed(TrainingRecipe, "batch_size", 128)
    epochs: int | None = changed(TrainingRecipe, "epochs", 100)
    text_weight: float = option(8.0, "weight of the distance between prompted and zero-shot text features")


def fit_kgcoop(task: Task) -> PromptHead:
    """KgCoOp: CoOp whose text features stay near those of zero-shot CLIP.

    Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with p at first the phrase's first words. Images: plain
    CLIP.

        loss = cross-entropy of s f t^T + 8 (1 - mean over c of t_c t'_c^T)
    """
    recipe: KgCoOpRecipe = task.recipe
    clip = task.clip
    prompts, rest = phrase_prompts(task)
    head = new_head(task, prompts, (), rest)
    zero_shot = task.text

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        text = head.encode_text()
        cross_entropy = F.cross_entropy(clip.logits(head.encode_image(inputs), text).float(), labels)
        distance = 1 - (text * zero_shot).sum(-1).mean()
        return cross_entropy + recipe.text_weight * distance, cross_entropy

    train(task, head, task.feature_loader(), loss_of=loss_of)
    return head.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ ProGrad


@dataclass(frozen=True)
class ProGradRecipe(CoOpRecipe):
    """That of the authors' scripts: CoOp's."""

    projection: float = option(1.0, "lambda, the share of a conflict with zero-shot CLIP that is taken away", min=0)


def fit_prograd(task: Task) -> PromptHead:
    """ProGrad: CoOp whose steps never lead away from zero-shot CLIP's predictions.

    Text: that of CoOp, with p at first zeros and, as the last ones, the words "a photo of a". Images: plain CLIP.
    With the gradients, by p, g of the cross-entropy of z = s f t^T with the labels, and h of its cross-entropy
    with softmax(s f t'^T), a step follows

        g - lambda min(0, g h^T) h / |h|^2
    """
    recipe: ProGradRecipe = task.recipe
    clip = task.clip
    words = clip.embed_words(PHRASE, len(PHRASE.split()))
    head = new_head(task, [F.pad(words, (0, 0, recipe.n_ctx - len(words), 0))], ())
    (prompts,) = head.text_prompts
    zero_shot = task.text

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = head.encode_image(inputs)
        logits = clip.logits(features, head.encode_text()).float()
        cross_entropy = F.cross_entropy(logits, labels)
        general_loss = F.cross_entropy(logits, clip.logits(features, zero_shot).float().softmax(-1))
        (general,) = torch.autograd.grad(general_loss, prompts, retain_graph=True)
        (step,) = torch.autograd.grad(cross_entropy, prompts)
        agreement = (step * general).sum()
        if agreement < 0:
            step = step - recipe.projection * agreement / general.square().sum() * general
        return (prompts * step).sum(), cross_entropy  # whose gradient is the step

    train(task, head, task.feature_loader(), loss_of=loss_of)
    return head.requires_grad_(False)


PAPER = "Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022"
COCOOP = Method("cocoop", "CoCoOp", PAPER, fit_cocoop, CoCoOpRecipe, Abilities(linear=False, fitted=True))

PAPER = "Yao et al., Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, CVPR 2023"
KGCOOP = Method("kgcoop", "KgCoOp", PAPER, fit_kgcoop, KgCoOpRecipe)

PAPER = "Zhu et al., Prompt-aligned Gradient for Prompt Tuning, ICCV 2023"
PROGRAD = Method("prograd", "ProGrad", PAPER, fit_prograd, ProGradRecipe)
