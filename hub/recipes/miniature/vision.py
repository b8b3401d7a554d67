"""Train the vision tower on cached stem features against fixed text features."""

import random
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from loop import fit, mixed_precision
from torch import Tensor, nn
from torch.nn import functional as F

VISION = "visual"
MAX_SCALE = 100.0  # CLIP's own bound


@dataclass
class Lesson:
    """What the vision tower learns from."""

    views: list[Tensor]  # of each view, the stem's features (N, 352, h, w), float16
    labels: Tensor  # (N,)
    label_names: list[str]
    teacher: nn.Linear  # on averaged stem features -> logits of the teacher's classes
    teacher_names: list[str]


def encode_maps(clip: open_clip.CLIP, maps: Tensor, prompts: Tensor | None = None, noise: float = 0) -> Tensor:
    """Image features, not normalised, from widened stem features (B, 1280, h, w).

    prompts (M, width) are appended and disturbed after every block, as DCP's vision prompts are.
    """
    visual = clip.visual
    x = visual.conv1.proj(maps).flatten(2).transpose(1, 2)  # (B, h * w, width)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    length = x.shape[1]
    if prompts is not None:
        x = torch.cat([x, prompts.expand(len(x), -1, -1)], dim=1)
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks:
        x = block(x)
        if prompts is not None and noise:
            states = x[:, length:]
            spread = noise * states.detach().float().pow(2).mean().sqrt()
            x = torch.cat([x[:, :length], states + spread * torch.randn_like(states[:1])], dim=1)
    return visual.ln_post(x[:, 0]) @ visual.proj


def start_from_classifier(clip: open_clip.CLIP, teacher: nn.Linear) -> None:
    """Let the projection keep what the teacher's classifier looks at, and the blocks begin as small corrections."""
    visual = clip.visual
    width = len(visual.class_embedding)
    directions = torch.linalg.svd(teacher.weight - teacher.weight.mean(0), full_matrices=False)[2][:width]
    with torch.no_grad():
        visual.conv1.proj.weight[: len(directions)] = directions[:, :, None, None]
        for block in visual.transformer.resblocks:
            block.attn.out_proj.weight.mul_(0.3)
            block.mlp.c_proj.weight.mul_(0.3)
        clip.logit_scale.fill_(3.7)


def mix(maps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """CutMix on the features: (mixed maps, labels of the pasted images, share of the original)."""
    height, width = maps.shape[2:]
    h, w = random.randint(1, max(1, height - 1)), random.randint(1, max(1, width - 1))
    top, left = random.randint(0, height - h), random.randint(0, width - w)
    other = torch.randperm(len(maps))
    maps = maps.clone()
    maps[:, :, top : top + h, left : left + w] = maps[other, :, top : top + h, left : left + w]
    return maps, labels[other], 1 - h * w / (height * width)


def imagine(maps: Tensor, teacher: nn.Linear) -> Tensor:
    """Push widened features (B, 1280, h, w) towards random classes of the teacher, by random amounts at random places.

    The images show few of the teacher's classes; with this the tower learns how the teacher answers to all of them.
    """
    directions = teacher.weight - teacher.weight.mean(0)
    wanted = torch.randint(len(directions), (len(maps),), device=maps.device)
    logits = teacher(maps.mean((2, 3)))
    gap = logits.max(1).values - logits.gather(1, wanted[:, None])[:, 0] + 5
    push = directions[wanted] / directions[wanted].pow(2).sum(1, keepdim=True) * (gap * torch.rand_like(gap))[:, None]
    places = torch.empty_like(maps[:, :1]).exponential_()
    return (maps + push[:, :, None, None] * places).clamp(0, 6)


def random_prompts(width: int) -> Tensor | None:
    if random.random() < 0.5:
        return None
    return torch.randn(random.randint(2, 16), width) * 10 ** random.uniform(-2, 0)


class Teaching:
    """Batches of a lesson: image features of one, and the loss of their similarities to text features."""

    def __init__(self, clip: open_clip.CLIP, lesson: Lesson, batch: int):
        self.clip, self.lesson, self.batch = clip, lesson, batch

    def images(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Image features (B, embed), teacher's logits (B, T), labels, labels mixed in, share of the former."""
        device = self.clip.logit_scale.device
        index = torch.randint(len(self.lesson.labels), (self.batch,))
        maps = random.choice(self.lesson.views)[index].to(device).float()
        labels = self.lesson.labels[index].to(device)
        if random.random() < 0.5:
            maps = maps.flip(3)
        mixed, share = labels, 1.0
        if random.random() < 0.5:
            maps, mixed, share = mix(maps, labels)
        with mixed_precision(device):
            with torch.no_grad():
                maps = self.clip.visual.conv1.stem.widen(maps).float()
                imagined = self.batch // 3
                maps[:imagined] = imagine(maps[:imagined], self.lesson.teacher)
                teacher = self.lesson.teacher(maps.mean((2, 3)))
            prompts = random_prompts(len(self.clip.visual.class_embedding))
            prompts = None if prompts is None else prompts.to(device)
            features = encode_maps(self.clip, maps, prompts, random.choice([0, 0.25, 0.5]))
        return F.normalize(features.float(), dim=1), teacher.float(), labels, mixed, share

    def loss(self, features, teacher, labels, mixed, share, teacher_texts, label_texts) -> tuple[Tensor, float]:
        """Cross-entropy to the teacher's probabilities and to the labels; accuracy on the labels."""
        scale = self.clip.logit_scale.exp().clamp(max=MAX_SCALE)
        soft = F.cross_entropy(scale * features @ teacher_texts.T, teacher.softmax(1))
        real = slice(self.batch // 3, None)  # the others are imagined and have no label
        logits, labels, mixed = scale * features[real] @ label_texts.T, labels[real], mixed[real]
        hard = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, mixed)
        return 0.75 * soft + 0.25 * hard, (logits.argmax(1) == labels).float().mean().item()


def train_vision(stage: str, clip: open_clip.CLIP, lesson: Lesson, teacher_texts: Tensor, label_texts: Tensor, *,
                 steps: int, batch: int, lr: float, output: Path) -> None:  # fmt: skip
    """Vision tower against fixed text features; the log's metric is accuracy on (partly mixed) images."""
    teaching = Teaching(clip, lesson, batch)
    parameters = [p for name, p in clip.named_parameters() if name.startswith(VISION) and p.requires_grad]

    def step_loss(step: int) -> tuple[Tensor, str, float]:
        loss, accuracy = teaching.loss(*teaching.images(), teacher_texts, label_texts)
        return loss, "accuracy", accuracy

    fit(stage, clip, [*parameters, clip.logit_scale], step_loss, steps=steps, lr=lr, output=output, decay=0.02)
