"""What training minimises."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.training.recipes import TrainingRecipe
from dcp_zoo.training.stage import TEMPLATE


def objective(
    model: Any, recipe: TrainingRecipe, class_weights: Tensor | None = None
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """The loss of (images, labels, patches), see `DCP.forward`: cross-entropy, and for a DCP

        agreement * mean |t - t'|

    with its text features t (C, E) and those of zero-shot CLIP, t', as in PromptSRC (Khattak et al., ICCV 2023): a few
    images shall not undo what CLIP knows about the names.

    Args:
        model: a DCP, or a baseline on the same CLIP.
        recipe: its `agreement` is the weight; 0, and without that field, the model's forward alone is used.
        class_weights: weights (C,) of the images' losses by class. Default: all 1.
    """
    weight = getattr(recipe, "agreement", 0.0)
    if not weight:
        return lambda images, labels, patches: _cross_entropy(model(images, patches=patches), labels, class_weights)
    zero_shot = F.normalize(model.encode_sentences(model.classnames, TEMPLATE), dim=-1)

    def loss(images: Tensor, labels: Tensor, patches: bool) -> Tensor:
        image_features, text_features = model.encode(images, patches)
        distance = (text_features - zero_shot).float().abs().mean()
        return _cross_entropy(model.logits(image_features, text_features), labels, class_weights) + weight * distance

    return loss


def _cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    logits = logits.float()
    if class_weights is None:
        return F.cross_entropy(logits, labels)
    return (F.cross_entropy(logits, labels, reduction="none") * class_weights.to(logits)[labels]).mean()
