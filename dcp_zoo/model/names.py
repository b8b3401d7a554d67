"""Class names: validated, tokenised, and packed for the text tower."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dcp_zoo.errors import ZooError

CHUNK_TOKENS = 1024  # tokens of class names computed at once
MIN_SAVING = 0.1  # share tokens only if this fraction of them is saved; below it, the lookup costs more


def check_classnames(classnames: Sequence[str]) -> list[str]:
    """The names as a list; ZooError if there are none or one is empty, and a warning if some are repeated."""
    if isinstance(classnames, str):
        raise ZooError(f"classnames must be a list of names, not the single string {classnames!r}.")
    names = list(classnames)
    if not names or not all(map(_normalised, names)):
        raise ZooError("Class names must not be empty: pass at least one name, and no blank ones.")
    if problem := repeated_names(names):
        warnings.warn(problem, stacklevel=3)
    return names


def check_room(n_ctx: int, text: Any) -> None:
    """ZooError if so many prompts leave no room for a class name in the text tower's context."""
    room = len(text.positional_embedding) - 4  # start, a name's token, full stop, end
    if n_ctx > room:
        raise ZooError(f"n_ctx must be at most {room} for this CLIP, not {n_ctx}: no class name would fit.")


def repeated_names(names: Sequence[str]) -> str:
    """A message about names that occur more than once, or "". Some datasets have such names, including ImageNet."""
    counts = Counter(map(_normalised, names))
    repeated = sorted({name for name in names if counts[_normalised(name)] > 1})
    return f"Repeated class names cannot be told apart: {', '.join(map(repr, repeated))}. Rename them." * bool(repeated)


def _normalised(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def default_tokenizer() -> Callable[..., torch.Tensor]:
    """open_clip's BPE tokenizer, used by OpenAI's CLIP models."""
    import open_clip

    return open_clip.tokenizer.SimpleTokenizer()


class ClassNames(nn.Module):
    """The token ids of all class names, packed end to end without padding and grouped by length.

    Packed order is by length, so that names of equal length form a contiguous (names, length) block: S tokens in total.
    As the tower is causal, names with a common beginning have the same states there: such tokens are kept once, which
    leaves U of S. If that saves less than `MIN_SAVING`, all are kept, and `unique_index` and `first_index` are None.

    Args:
        suffixes: per class, the token ids of its name, full stop and end token.
        sos_id: token id of the start token.
        first_position: position of a name's first token, 1 + M.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    order: torch.Tensor
    unique_index: torch.Tensor | None
    first_index: torch.Tensor | None

    def __init__(self, suffixes: Sequence[torch.Tensor], sos_id: int, first_position: int) -> None:
        super().__init__()
        self.sos_id = sos_id
        lengths = torch.tensor([len(s) for s in suffixes])
        packed = lengths.argsort(stable=True)
        self.groups = [(int(n), int(c)) for n, c in zip(*lengths.unique(return_counts=True), strict=True)]
        ids = torch.cat([suffixes[i] for i in packed])
        positions = torch.cat([first_position + torch.arange(int(lengths[i])) for i in packed])
        ends = lengths[packed].cumsum(0) - 1
        unique, first = _shared_tokens([suffixes[i].tolist() for i in packed])
        sharing = len(first) <= (1 - MIN_SAVING) * len(ids)
        buffers = {
            "ids": ids[first] if sharing else ids,  # (U,)
            "positions": positions[first] if sharing else positions,  # (U,)
            "ends": unique[ends] if sharing else ends,  # (C,) index of each name's end token, in packed order
            "order": packed.argsort(),  # (C,) packed index of each class
            "unique_index": unique if sharing else None,  # (S,) index into the U tokens of each packed token
            "first_index": first if sharing else None,  # (U,) packed index of each one's first occurrence
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def to_packed(self, x: torch.Tensor) -> torch.Tensor:
        """(H, U, d) of the unique tokens -> (H, S, d) of all packed tokens."""
        return x if self.unique_index is None else x.index_select(1, self.unique_index)

    def to_unique(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_packed`."""
        return x if self.first_index is None else x.index_select(1, self.first_index)


def _shared_tokens(names: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """`ClassNames.unique_index` and `first_index`: two tokens are shared if the names are equal up to them."""
    paths = [tuple(name[: t + 1]) for name in names for t in range(len(name))]
    first: dict[tuple[int, ...], int] = {}
    for s, path in enumerate(paths):
        first.setdefault(path, s)
    number = {path: i for i, path in enumerate(first)}
    return torch.tensor([number[path] for path in paths]), torch.tensor(list(first.values()))


def tokenize_names(classnames: Sequence[str], tokenizer: Callable[..., torch.Tensor], text: Any, n_ctx: int) -> Any:
    """Tokenise `name.` for every class, with spaces for underscores; ZooError if a name does not fit the context.

    Returns:
        A ModuleList of `ClassNames`: consecutive classes in chunks of about `CHUNK_TOKENS` tokens.
    """
    context_length = len(text.positional_embedding)
    room = context_length - 1 - n_ctx  # for name, full stop and end token
    # longer than the tower's context, so that long names are detected instead of truncated
    ids = tokenizer([name.replace("_", " ") + "." for name in classnames], context_length=4 * context_length)
    ends = end_positions(text, ids)
    for name, end in zip(classnames, ends.tolist(), strict=True):
        if end > room:
            raise ZooError(
                f"The class name {name!r} takes {end} tokens, but only {room} are left next to {n_ctx} prompt tokens: "
                "shorten the name or use fewer prompt tokens (n_ctx)."
            )
    suffixes = [row[1 : end + 1] for row, end in zip(ids, ends, strict=True)]
    chunk_of = (ends.cumsum(0) - 1) // CHUNK_TOKENS  # a name's number of tokens is the position of its end
    return nn.ModuleList(
        ClassNames([suffixes[i] for i in (chunk_of == n).nonzero()], int(ids[0, 0]), 1 + n_ctx)
        for n in chunk_of.unique()
    )


def end_positions(text: Any, ids: torch.Tensor) -> torch.Tensor:
    """ids (C, L) -> (C,), the position of each row's end token: the highest id, or the tower's `eos_id`."""
    pool_type = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    if pool_type == "argmax":
        return ids.argmax(-1)
    eos_id: Any = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
    return ids.eq(eos_id).int().argmax(-1)
