"""Fine-tune both towers jointly: images against the text tower's actual output."""

from pathlib import Path

import open_clip
import torch
from loop import fit, mixed_precision
from phrases import Phrases
from text import distil_loss, encode_phrases, sample_batches, template_tokens
from torch import Tensor
from torch.nn import functional as F
from vision import VisionData, VisionObjective

EXTRA_NAMES = 100  # of the teacher's classes, sampled in every step, in addition to all label names


def align(clip: open_clip.CLIP, data: VisionData, phrases: Phrases, *, steps: int, batch: int, lr: float,
          output: Path) -> None:  # fmt: skip
    """Both towers; text distillation continues, so that words without images keep their features."""
    objective = VisionObjective(clip, data, batch)
    templates = template_tokens()
    tokens = dict(zip(phrases.texts, phrases.ids, strict=True))
    device = clip.logit_scale.device
    parameters = [p for name, p in clip.named_parameters() if p.requires_grad]

    def encode(names: list[str], targets: Tensor) -> tuple[Tensor, Tensor]:
        with mixed_precision(device):
            features = encode_phrases(clip, [tokens[name] for name in names], templates)
        return F.normalize(features.float(), dim=1), distil_loss(features, targets.to(device))[0]

    def step_loss(step: int) -> tuple[Tensor, str, float]:
        features, teacher, labels, mixed, share = objective.sample()
        extra = torch.randperm(len(data.teacher_names))[:EXTRA_NAMES]
        names = data.label_names + [data.teacher_names[i] for i in extra.tolist()]
        texts, drift = encode(names, phrases.of(names))
        label_texts, extra_texts = texts.split([len(data.label_names), len(extra)])
        loss, accuracy = objective.loss(features, teacher[:, extra], labels, mixed, share, extra_texts, label_texts)
        index = sample_batches(phrases, batch, 10_000 + step // 16)[step % 16]
        distilled = encode([phrases.texts[i] for i in index.tolist()], phrases.targets[index])[1]
        return loss + 0.3 * drift + 0.7 * distilled, "accuracy", accuracy

    fit("align", clip, parameters, step_loss, steps=steps, lr=lr, output=output)
