"""Successors of CoOp, which also learn prompts in the text alone, for any image tower: KgCoOp.

With image features f (B, E), text features t (C, E) with prompts and t' of zero-shot CLIP, all normalised, and
s = exp(logit_scale).
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Method
from dcp_zoo.training.methods.prompts import IndependentRecipe, new_head, random_prompts, start_from
from dcp_zoo.training.recipes import TrainingRecipe, changed, count, option
from dcp_zoo.training.task import Task


@dataclass(frozen=True)
class KgCoOpRecipe(TrainingRecipe):
    """The authors' for ViT-B/16, the same in all of their protocols."""

    lr: float = changed(TrainingRecipe, "lr", 0.002)
    batch_size: int = changed(TrainingRecipe, "batch_size", 128)
    epochs: int | None = changed(TrainingRecipe, "epochs", 100)
    n_ctx: int = count(4, "prompt tokens")
    ctx_init: str = changed(IndependentRecipe, "ctx_init", "a photo of a")
    text_weight: float = option(8.0, "weight of the distance between prompted and zero-shot text features")


def fit_kgcoop(task: Task) -> PromptHead:
    """KgCoOp: CoOp whose text features stay near those of zero-shot CLIP.

    Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with p at first the phrase's first words. Images: plain
    CLIP.

        loss = cross-entropy of s f t^T + 8 (1 - mean over c of t_c t'_c^T)
    """
    recipe: KgCoOpRecipe = task.recipe
    clip = task.clip
    prompts, rest = start_from(clip, random_prompts(1, recipe.n_ctx, clip.text_tower.width), recipe.ctx_init)
    head = new_head(task, prompts, (), rest)
    zero_shot = task.text

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        text = head.encode_text()
        cross_entropy = F.cross_entropy(clip.logits(head.encode_image(inputs), text).float(), labels)
        distance = 1 - (text * zero_shot).sum(-1).mean()
        return cross_entropy + recipe.text_weight * distance, cross_entropy

    train(task, head, task.feature_loader(), loss_of=loss_of)
    return head.requires_grad_(False)


PAPER = "Yao et al., Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, CVPR 2023"
KGCOOP = Method("kgcoop", "KgCoOp", PAPER, fit_kgcoop, KgCoOpRecipe)
