"""What a trained DCP learnt: its text prompts as words, and what attends to what in CMPA."""

from typing import Any, NamedTuple

import numpy as np
import torch

from dcp_zoo.errors import ZooError, check_range
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.heads.head import Head


class PromptWords(NamedTuple):
    """The tokens of CLIP's vocabulary that are nearest to one text prompt.

    Attributes:
        block: which the prompt enters; 0 for the learned prompts themselves, without their positions.
        prompt: its position among the prompts, from 0.
        tokens: nearest first; one that ends a word has a space behind it.
        distances: Euclidean, to the embedding of each of these tokens.
        median: of the distances to the whole vocabulary.
    """

    block: int
    prompt: int
    tokens: list[str]
    distances: list[float]
    median: float


@torch.no_grad()
def prompt_words(model: Head, top_k: int = 3) -> list[PromptWords]:
    """The `top_k` tokens of CLIP's vocabulary that are nearest to each text prompt, as it enters block 0
    and each coupled block, in the stored statistics; as CoOp's and MaPLe's scripts `interpret_prompt`
    print them. ZooError for a head that is no DCP, or has no statistics.

    Words only describe the prompts of block 0, which stand where token embeddings do. Later ones are
    compared with the same embeddings, as in those scripts, but are what blocks and CMPA made: where
    `distances` are hardly smaller than `median`, the words say nothing.
    """
    check_range("top_k", top_k, 1)
    head = checked(model)
    entering = [head.prompts["text"]]
    for cmpa, v, t in head.read_by_cmpa():
        new_t = cmpa(v, t)[1]
        entering.append(t if new_t is None else new_t)
    clip = model.encoder
    vocabulary = clip.text.token_embedding.weight.float()
    tokenizer: Any = getattr(clip.tokenizer, "tokenizer", clip.tokenizer)  # open_clip's holds one of transformers
    words = []
    for block, prompts in enumerate(entering):
        distances = torch.cdist(prompts.float(), vocabulary)
        nearest, tokens = distances.topk(top_k, largest=False)
        for prompt, ids in enumerate(tokens.tolist()):
            names = [tokenizer.decode([token]) for token in ids]
            median = distances[prompt].median().item()
            words.append(PromptWords(block, prompt, names, nearest[prompt].tolist(), median))
    return words


@torch.no_grad()
def prompt_attention(model: Head) -> dict[str, np.ndarray]:
    """CMPA's attention before each coupled block, in the stored statistics. ZooError as of `prompt_words`.

    Returns:
        Of each tower whose prompts are rewritten, "vision" or "text", the weights (K, heads, M, M): how
        much the prompt in the row, of the tower that asks, attends to the prompt in the column, of the
        tower itself. Each row sums to 1, and row m makes the tower's new prompt m.
    """
    weights: dict[str, list[np.ndarray]] = {}
    for cmpa, v, t in checked(model).read_by_cmpa():
        for tower, attention, own, other in cmpa.inputs(v, t):
            of_tower = attention.attend(own, other, average_attn_weights=False)[1]
            weights.setdefault(tower, []).append(of_tower.float().cpu().numpy())
    return {tower: np.stack(blocks) for tower, blocks in weights.items()}


def checked(model: Head) -> DCP:
    """The head, if it is a DCP; else ZooError."""
    if isinstance(model, DCP):
        return model
    raise ZooError("Only heads of dcp have coupled prompts: train one with method dcp.")
