"""Class names: checked, tokenised, and packed for the text tower."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dcp_zoo.errors import ZooError

CHUNK_TOKENS = 1024  # tokens of class names that are computed at once
WORTH_SHARING = 0.1  # the part of all tokens that must be saved; below it, looking tokens up costs more


def check_classnames(classnames: Sequence[str]) -> list[str]:
    """The names as a list; ZooError if there are none or one is empty, a warning if some are repeated."""
    if isinstance(classnames, str):
        raise ZooError(f"classnames must be a list of names, not the single string {classnames!r}.")
    names = list(classnames)
    if not names or not all(map(_spoken, names)):
        raise ZooError("Class names must not be empty: give at least one name, and text in each.")
    if problem := repeated_names(names):
        warnings.warn(problem, stacklevel=3)
    return names


def repeated_names(names: Sequence[str]) -> str:
    """What is wrong with names that occur twice, or "". Some datasets have them, ImageNet among them."""
    counts = Counter(map(_spoken, names))
    repeated = sorted({name for name in names if counts[_spoken(name)] > 1})
    return f"Repeated class names cannot be told apart: {', '.join(map(repr, repeated))}. Rename them." * bool(repeated)


def _spoken(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def default_tokenizer() -> Callable[..., torch.Tensor]:
    """open_clip's BPE tokenizer, which OpenAI's CLIP models use."""
    import open_clip

    return open_clip.tokenizer.SimpleTokenizer()


class ClassNames(nn.Module):
    """The token ids of all class names, packed end to end without padding and grouped by length.

    Packed order is by length, so that the names of one length are a contiguous (names, length) block: S tokens in all.
    Names that begin alike have the same states there, as the tower is causal: of these tokens one is kept, which leaves
    U of S. Where that saves less than `WORTH_SHARING`, all are kept, and `place` and `first` are None.

    Args:
        suffixes: per class, the token ids of its name, full stop and end token.
        sos_id: token id of the start token.
        first_position: position of a name's first token, 1 + M.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    order: torch.Tensor
    place: torch.Tensor | None
    first: torch.Tensor | None

    def __init__(self, suffixes: Sequence[torch.Tensor], sos_id: int, first_position: int) -> None:
        super().__init__()
        self.sos_id = sos_id
        lengths = torch.tensor([len(s) for s in suffixes])
        packed = lengths.argsort(stable=True)
        self.groups = [(int(n), int(c)) for n, c in zip(*lengths.unique(return_counts=True), strict=True)]
        ids = torch.cat([suffixes[i] for i in packed])
        positions = torch.cat([first_position + torch.arange(int(lengths[i])) for i in packed])
        ends = lengths[packed].cumsum(0) - 1
        place, first = _shared_tokens([suffixes[i].tolist() for i in packed])
        sharing = len(first) <= (1 - WORTH_SHARING) * len(ids)
        buffers = {
            "ids": ids[first] if sharing else ids,  # (U,)
            "positions": positions[first] if sharing else positions,  # (U,)
            "ends": place[ends] if sharing else ends,  # (C,) which of them is each name's end token, in packed order
            "order": packed.argsort(),  # (C,) the packed place of every class
            "place": place if sharing else None,  # (S,) which of the U every packed token is
            "first": first if sharing else None,  # (U,) where in packed order each of them is met first
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(H, U, d) of the tokens that are kept -> (H, S, d) of all packed ones."""
        return x if self.place is None else x.index_select(1, self.place)

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of `spread`."""
        return x if self.first is None else x.index_select(1, self.first)


def _shared_tokens(names: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """`ClassNames.place` and `first`: a token is another's equal if all tokens up to it are."""
    paths = [tuple(name[: t + 1]) for name in names for t in range(len(name))]
    first: dict[tuple[int, ...], int] = {}
    for s, path in enumerate(paths):
        first.setdefault(path, s)
    number = {path: i for i, path in enumerate(first)}
    return torch.tensor([number[path] for path in paths]), torch.tensor(list(first.values()))


def tokenize_names(classnames: Sequence[str], tokenizer: Callable[..., torch.Tensor], text: Any, n_ctx: int) -> Any:
    """Tokenise `name.` for every class, underscores read as spaces; ZooError if a name does not fit the context.

    Returns:
        A ModuleList of `ClassNames`: consecutive classes in chunks of about `CHUNK_TOKENS` tokens.
    """
    context_length = len(text.positional_embedding)
    room = context_length - 1 - n_ctx  # for name, full stop and end token
    # asked for more than the tower's context, so that a long name shows instead of being cut
    ids = tokenizer([name.replace("_", " ") + "." for name in classnames], context_length=4 * context_length)
    ends = end_positions(text, ids)
    for name, end in zip(classnames, ends.tolist(), strict=True):
        if end > room:
            raise ZooError(
                f"The class name {name!r} takes {end} tokens, and {room} are left beside {n_ctx} prompt tokens: "
                "shorten the name or use fewer prompt tokens (n_ctx)."
            )
    suffixes = [row[1 : end + 1] for row, end in zip(ids, ends, strict=True)]
    chunk_of = (ends.cumsum(0) - 1) // CHUNK_TOKENS  # a name has as many tokens as its end's position
    return nn.ModuleList(
        ClassNames([suffixes[i] for i in (chunk_of == n).nonzero()], int(ids[0, 0]), 1 + n_ctx)
        for n in chunk_of.unique()
    )


def end_positions(text: Any, ids: torch.Tensor) -> torch.Tensor:
    """ids (C, L) -> (C,) where each row's end token is: the highest id, or the one that the tower names."""
    pool_type = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    if pool_type == "argmax":
        return ids.argmax(-1)
    eos_id: Any = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
    return ids.eq(eos_id).int().argmax(-1)
