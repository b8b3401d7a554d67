"""What training minimises."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.training.recipes import TrainingRecipe
from dcp_zoo.training.stage import zero_shot_text

TEXT_WEIGHT, IMAGE_WEIGHT = 25.0, 10.0  # PromptSRC's


def objective(
    model: Any, recipe: TrainingRecipe, class_weight: Tensor | None = None
) -> Callable[[Tensor, Tensor, bool, Tensor | None], tuple[Tensor, Tensor]]:
    """The loss of (images, labels, patches, targets), see `DCP.forward`, and the cross-entropy alone, which is the loss
    but for a DCP, whose loss is

        cross-entropy + clip_reg * (25 mean |t - t'| + 10 mean |f - f'|)

    with its text features t (C, E), its image features f (B, E), and those of zero-shot CLIP, t' and f', as in
    PromptSRC (Khattak et al., ICCV 2023), against overfitting to a few images. f' are the targets, or for None computed
    in the step, which takes a third longer (`dcp_vitb16`, 10 classes, batch size 4).

    Args:
        model: a DCP, or a baseline on the same CLIP.
        recipe: its `clip_reg`; for 0, and for a recipe without it, the model's forward alone is used.
        class_weight: weights (C,) of the images' losses by class. Default: all 1.
    """
    clip_reg = getattr(recipe, "clip_reg", 0.0)

    def plain(images: Tensor, labels: Tensor, patches: bool, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loss = _cross_entropy(model(images, patches=patches), labels, class_weight)
        return loss, loss

    if not clip_reg:
        return plain
    zero_shot = zero_shot_text(model)

    def regularised(
        images: Tensor, labels: Tensor, patches: bool, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features, text = model.encode(images, patches)
        if targets is None:
            with torch.no_grad():
                targets = model.encode_prompted(images, patches=patches)
        distance = TEXT_WEIGHT * _distance(text, zero_shot) + IMAGE_WEIGHT * _distance(features, targets)
        cross_entropy = _cross_entropy(model.logits(features, text), labels, class_weight)
        return cross_entropy + clip_reg * distance, cross_entropy

    return regularised


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one.float() - other.float()).abs().mean()


def _cross_entropy(logits: Tensor, labels: Tensor, class_weight: Tensor | None) -> Tensor:
    logits = logits.float()
    if class_weight is None:
        return F.cross_entropy(logits, labels)
    return (F.cross_entropy(logits, labels, reduction="none") * class_weight.to(logits)[labels]).mean()
