"""Token ids of texts: how long they are, where they start and end, and where a text tower reads them."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dcp_zoo.errors import ZooError

Tokenizer = Callable[..., Tensor]
EXPORTING: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # since torch 2.7


@cache
def default_tokenizer() -> Tokenizer:
    """open_clip's BPE tokenizer, used by OpenAI's CLIP models."""
    import open_clip

    return open_clip.tokenizer.SimpleTokenizer()


def last_tokens(ids: Tensor) -> Tensor:
    """ids (n, L) -> (n,), the position of the last token before the padding, which may be the end token
    too."""
    return (ids != ids[:, -1:]).long().cumsum(1).argmax(1)


def check_lengths(texts: Sequence[str], lengths: Tensor, most: int, n_ctx: int = 0) -> None:
    """ZooError for the first text that has more than `most` tokens, which are left beside `n_ctx`
    prompts."""
    if EXPORTING():
        raise ZooError(
            "torch.export cannot trace this head, which reads the names of its classes: "
            "torch.export.export(model.fuse(), ...) reads images alone, and gives the same logits."
        )
    beside = f" next to {n_ctx} prompt tokens, of which n_ctx sets the number" if n_ctx else ""
    for text, length in zip(texts, lengths.tolist(), strict=True):
        if length > most:
            raise ZooError(f"The text {text!r} takes {length} tokens, but only {most} are left{beside}: shorten it.")


def start_tokens(tokenizer: Tokenizer) -> int:
    """1 if the tokenizer begins every text with a start token, as CLIP's does; 0 if not, as SigLIP's."""
    first, second = tokenizer(["a", "the"])[:, 0].tolist()
    return int(first == second)


def pool_type(text: object) -> str | None:
    """Which token a text tower reads: "argmax" (the highest id), "eos", "first" or "last"."""
    return getattr(text, "pool_type", getattr(text, "text_pool_type", None))


def end_positions(text: object, ids: Tensor) -> Tensor:
    """ids (C, L) -> (C,), the position of each row's end token: the highest id, or the tower's `eos_id`."""
    if pool_type(text) == "argmax":
        return ids.argmax(-1)
    eos_id: Any = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
    return ids.eq(eos_id).int().argmax(-1)
