"""Train the vision tower on cached stem features against fixed text features."""

import random
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from loop import fit, mixed_precision, ridge
from phrases import centred
from torch import Tensor, nn
from torch.nn import functional as F

VISION = "visual"
SCALE = 100.0  # CLIP's
INIT_BATCHES = 32  # that the projection is fitted on before training
CONTENT = 0.65  # how much of an image's first feature tells images apart; the rest is the gap between the modalities


@dataclass
class VisionData:
    """Training data of the vision tower."""

    maps: Tensor  # the stem's features (N, 352, h, w), float16
    labels: Tensor  # (N,)
    label_names: list[str]
    teacher: nn.Linear  # averaged stem features -> logits of the teacher's classes
    teacher_names: list[str]


def encode_maps(clip: open_clip.CLIP, maps: Tensor, prompts: Tensor | None = None, noise: float = 0) -> Tensor:
    """Unnormalised image features (B, embed) from widened stem features (B, 1280, h, w)."""
    return hidden(clip, maps, prompts, noise) @ clip.visual.proj


def hidden(clip: open_clip.CLIP, maps: Tensor, prompts: Tensor | None = None, noise: float = 0) -> Tensor:
    """The blocks' output at the class token, (B, width).

    prompts (M, width) are appended and perturbed after every block, like DCP's vision prompts.
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
    return visual.ln_post(x[:, 0])


def init_from_classifier(clip: open_clip.CLIP, teacher: nn.Linear) -> None:
    """Initialise the projection with the directions used by the teacher's classifier, and scale down the
    blocks."""
    visual = clip.visual
    width = len(visual.class_embedding)
    directions = torch.linalg.svd(teacher.weight - teacher.weight.mean(0), full_matrices=False)[2][:width]
    with torch.no_grad():
        visual.conv1.proj.weight[: len(directions)] = directions[:, :, None, None]
        for block in visual.transformer.resblocks:
            block.attn.out_proj.weight.mul_(0.3)
            block.mlp.c_proj.weight.mul_(0.3)


def first_targets(teacher: Tensor, texts: Tensor) -> Tensor:
    """Image features (B, embed) to begin with, from the teacher's logits (B, C) and text features (C,
    embed).

    The teacher's mixture of the centred texts, and a constant: mostly the direction in which texts differ
    least, and some of their mean. As with CLIP, images are about as far from all texts (a cosine of 0.2 to
    0.3), and only a part of their length tells them apart, which is what a scale of 100 asks for.
    """
    mean = F.normalize(texts.mean(0), dim=0)
    gap = torch.linalg.eigh(torch.cov(texts.T))[1][:, 0]
    gap = F.normalize(F.normalize(gap - (gap @ mean) * mean, dim=0) + 0.35 * mean, dim=0)
    mixed = teacher.softmax(1) @ centred(texts)
    mixed = F.normalize(mixed - (mixed @ mean)[:, None] * mean, dim=1)
    return CONTENT * mixed + (1 - CONTENT**2) ** 0.5 * gap


def mix(maps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """CutMix on features: (mixed maps, labels of the pasted images, share of the original)."""
    height, width = maps.shape[2:]
    h = random.randint(1, max(1, height - 1))
    w = random.randint(1, max(1, width - 1))
    top = random.randint(0, height - h)
    left = random.randint(0, width - w)
    other = torch.randperm(len(maps))
    maps = maps.clone()
    maps[:, :, top : top + h, left : left + w] = maps[other, :, top : top + h, left : left + w]
    return maps, labels[other], 1 - h * w / (height * width)


def push_to_random_classes(maps: Tensor, teacher: nn.Linear) -> Tensor:
    """Push widened features (B, 1280, h, w) towards random classes of the teacher, by random amounts at each
    position.

    The images show few of the teacher's classes; this way the tower learns the teacher's predictions for all
    of them.
    """
    directions = teacher.weight - teacher.weight.mean(0)
    target = torch.randint(len(directions), (len(maps),), device=maps.device)
    logits = teacher(maps.mean((2, 3)))
    gap = logits.max(1).values - logits.gather(1, target[:, None])[:, 0] + 5
    push = directions[target] / directions[target].pow(2).sum(1, keepdim=True) * (gap * torch.rand_like(gap))[:, None]
    weights = torch.empty_like(maps[:, :1]).exponential_()
    return (maps + push[:, :, None, None] * weights).clamp(0, 6)


def random_prompts(width: int) -> Tensor | None:
    if random.random() < 0.5:
        return None
    return torch.randn(random.randint(2, 16), width) * 10 ** random.uniform(-2, 0)


class VisionObjective:
    """Image features of random batches, and the loss of their similarities to text features."""

    def __init__(self, clip: open_clip.CLIP, data: VisionData, batch: int):
        self.clip = clip
        self.data = data
        self.batch = batch

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Widened maps (B, 1280, h, w), the teacher's logits (B, T), labels, mixed-in labels, share of the
        labels."""
        device = self.clip.logit_scale.device
        index = torch.randint(len(self.data.labels), (self.batch,))
        maps = self.data.maps[index].to(device).float()
        labels = self.data.labels[index].to(device)
        if random.random() < 0.5:
            maps = maps.flip(3)
        mixed = labels
        share = 1.0
        if random.random() < 0.5:
            maps, mixed, share = mix(maps, labels)
        with torch.no_grad(), mixed_precision(device):
            maps = self.clip.visual.conv1.stem.widen(maps).float()
            pushed = self.batch // 3
            maps[:pushed] = push_to_random_classes(maps[:pushed], self.data.teacher)
            return maps, self.data.teacher(maps.mean((2, 3))).float(), labels, mixed, share

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The same with image features (B, embed), unit length, instead of maps."""
        maps, *rest = self.draw()
        prompts = random_prompts(len(self.clip.visual.class_embedding))
        prompts = None if prompts is None else prompts.to(maps.device)
        with mixed_precision(maps.device):
            features = encode_maps(self.clip, maps, prompts, random.choice([0, 0.25, 0.5]))
        return F.normalize(features.float(), dim=1), *rest

    @torch.no_grad()
    def init_projection(self, texts: Tensor) -> None:
        """The least-squares projection to `first_targets`."""
        states = []
        targets = []
        for _ in range(INIT_BATCHES):
            maps, teacher, *_ = self.draw()
            states.append(hidden(self.clip, maps))
            targets.append(first_targets(teacher, texts))
        self.clip.visual.proj.data.copy_(ridge(torch.cat(states), torch.cat(targets)))

    def loss(self, features, teacher, labels, mixed, share, teacher_texts, label_texts) -> tuple[Tensor, float]:
        """Cross-entropy to the teacher's probabilities and to the labels; accuracy on the labels."""
        soft = F.cross_entropy(SCALE * features @ teacher_texts.T, teacher.softmax(1))
        real = slice(self.batch // 3, None)  # the others are pushed and have no label
        logits = SCALE * features[real] @ label_texts.T
        labels = labels[real]
        mixed = mixed[real]
        hard = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, mixed)
        return 0.75 * soft + 0.25 * hard, (logits.argmax(1) == labels).float().mean().item()


def train_vision(stage: str, clip: open_clip.CLIP, data: VisionData, teacher_texts: Tensor, label_texts: Tensor, *,
                 steps: int, batch: int, lr: float, output: Path, first: bool = False) -> None:  # fmt: skip
    """Train the vision tower on fixed text features; the logged metric is accuracy on (partly mixed)
    images."""
    objective = VisionObjective(clip, data, batch)
    if first and steps and not (output / f"{stage}.pt").exists():
        objective.init_projection(teacher_texts)
    parameters = [p for name, p in clip.named_parameters() if name.startswith(VISION) and p.requires_grad]

    def step_loss(step: int) -> tuple[Tensor, str, float]:
        loss, accuracy = objective.loss(*objective.sample(), teacher_texts, label_texts)
        return loss, "accuracy", accuracy

    fit(stage, clip, parameters, step_loss, steps=steps, lr=lr, output=output, decay=0.02)
