"""Fine-tune both towers on each other: images against what the text tower really says."""

from pathlib import Path

import open_clip
import torch
from loop import fit, mixed_precision
from phrases import Phrases
from text import distil_loss, draw, dress, template_tokens
from torch import Tensor
from torch.nn import functional as F
from vision import Lesson, Teaching

EXTRA_NAMES = 100  # of the teacher's classes, drawn anew for every step, beside all label names


def align(clip: open_clip.CLIP, lesson: Lesson, phrases: Phrases, *, steps: int, batch: int, lr: float,
          output: Path) -> None:  # fmt: skip
    """Both towers; distillation goes on beside it, so that words without images keep their place."""
    teaching = Teaching(clip, lesson, batch)
    templates = template_tokens()
    tokens = dict(zip(phrases.texts, phrases.ids, strict=True))
    device = clip.logit_scale.device
    parameters = [p for name, p in clip.named_parameters() if p.requires_grad]

    def speak(names: list[str], targets: Tensor) -> tuple[Tensor, Tensor]:
        with mixed_precision(device):
            features = dress(clip, [tokens[name] for name in names], templates)
        return F.normalize(features.float(), dim=1), distil_loss(features, targets.to(device))[0]

    def step_loss(step: int) -> tuple[Tensor, str, float]:
        features, teacher, labels, mixed, share = teaching.images()
        extra = torch.randperm(len(lesson.teacher_names))[:EXTRA_NAMES]
        names = lesson.label_names + [lesson.teacher_names[i] for i in extra.tolist()]
        texts, drift = speak(names, phrases.of(names))
        own, others = texts.split([len(lesson.label_names), len(extra)])
        loss, accuracy = teaching.loss(features, teacher[:, extra], labels, mixed, share, others, own)
        index = draw(phrases, batch, 10_000 + step // 16)[step % 16]
        distilled = speak([phrases.texts[i] for i in index.tolist()], phrases.targets[index])[1]
        return loss + 0.3 * drift + 0.7 * distilled, "accuracy", accuracy

    fit("align", clip, parameters, step_loss, steps=steps, lr=lr, output=output)
