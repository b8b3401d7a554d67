"""Learned prompts of a frozen CLIP, see `PromptHead`: what the methods that train them share."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.prompt_head import PromptHead
from dcp_zoo.training.methods.base import Task

PROMPT_STD = 0.02  # of initial prompts, as in the papers


def random_prompts(count: int, n_ctx: int, width: int) -> list[Tensor]:
    """`count` sets of random prompts (n_ctx, width)."""
    return [torch.randn(n_ctx, width) * PROMPT_STD for _ in range(count)]


def start_from(clip: FrozenCLIP, prompts: list[Tensor], phrase: str) -> tuple[list[Tensor], str]:
    """The text prompts, the first of which are a phrase's first words, if it has enough; and the words left."""
    words, n_ctx = phrase.split(), len(prompts[0])
    if len(words) >= n_ctx:
        prompts = [clip.embed_words(phrase, n_ctx), *prompts[1:]]
    return prompts, " ".join(words[n_ctx:])


def new_head(task: Task, text: Iterable[Tensor], vision: Iterable[Tensor], rest: str = "") -> PromptHead:
    """The task's CLIP with these prompts."""
    return PromptHead(task.clip, task.classnames, text, vision, texts=task.texts, rest=rest)
