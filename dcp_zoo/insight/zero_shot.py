"""Zero-shot CLIP: class names in one prompt template, without training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from dcp_zoo.model.names import Texts
from dcp_zoo.model.towers import cosine_logits


def zero_shot_classifier(model: Any, classnames: Sequence[str], template: Texts = "a photo of a {}.") -> torch.Tensor:
    """Normalised text features (C, E) from the CLIP of a DCP or a baseline: of `template` filled with each name, or the
    mean over sentences of each class, as in CuPL (Pratt et al., What does a platypus look like?, ICCV 2023)."""
    return F.normalize(model.encode_sentences(classnames, template), dim=-1)


@torch.inference_mode()
def zero_shot_logits(model: Any, images: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
    """images (B, 3, H, W), classifier (C, E) -> logits (B, C) of plain CLIP, without prompts and classifier stage."""
    return cosine_logits(model.clip, F.normalize(model.clip.encode_image(images), dim=-1), classifier)
