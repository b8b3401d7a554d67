"""Class names: validated, tokenised, and padded in chunks for the text tower."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError, shorten
from dcp_zoo.texts import is_reserved

CHUNK_TOKENS, CHUNK_PADDING = 1024, 64  # tokens of class names computed at once, and how many of them are padding
NAME = "{}."  # the template after learned prompts
TEMPLATE = "a photo of a {}."  # zero-shot CLIP's
Tokenizer = Callable[..., Tensor]
Descriptions = Mapping[str, Sequence[str]]  # sentences of each class
# a template for class names, or several, or sentences of each class
Texts = str | Sequence[str] | Descriptions


def check_classnames(classnames: Sequence[str]) -> list[str]:
    """The names as a list; ZooError if there are none, or one is empty or reserved; a warning if some are repeated."""
    if isinstance(classnames, str):
        raise ZooError(f"classnames must be a list of names, not the single string {classnames!r}.")
    names = list(classnames)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ZooError(f"Class names must be strings, not {wrong[0]!r}: a text tower reads them.")
    if not names or not all(map(_normalised, names)):
        raise ZooError("Class names must not be empty: pass at least one name, and no blank ones.")
    if reserved := [name for name in names if is_reserved(name)]:
        raise ZooError(f"{reserved[0]!r} is a reserved name, and cannot be a class: choose another name.")
    if problem := repeated_names(names):
        warnings.warn(problem, stacklevel=3)
    return names


def repeated_names(names: Sequence[str]) -> str:
    """A message about names that occur more than once, or "". Some datasets have such names, including ImageNet."""
    counts = Counter(map(_normalised, names))
    repeated = sorted({name for name in names if counts[_normalised(name)] > 1})
    return f"Repeated class names cannot be told apart: {', '.join(map(repr, repeated))}. Rename them." * bool(repeated)


def _normalised(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def sentences_of(classnames: Sequence[str], descriptions: Descriptions) -> dict[str, list[str]]:
    """The sentences of each class; ZooError if there are none for one."""
    similar = {_normalised(name): sentences for name, sentences in descriptions.items()}
    found = {name: list(descriptions.get(name) or similar.get(_normalised(name)) or []) for name in classnames}
    if missing := [name for name, sentences in found.items() if not sentences]:
        problem = f"The descriptions have no sentences for {shorten(list(map(repr, missing)), 5)}"
        raise ZooError(f"{problem}: pass descriptions (--descriptions FILE.json) with at least one for every class.")
    return found


def as_sentences(classnames: Sequence[str], texts: Texts) -> dict[str, list[str]]:
    """What CLIP reads of each class; ZooError as of `sentences_of`."""
    if isinstance(texts, Mapping):
        return sentences_of(classnames, texts)
    templates = [texts] if isinstance(texts, str) else texts
    return {name: [template.replace("{}", name.replace("_", " ")) for template in templates] for name in classnames}


def saved_texts(classnames: Sequence[str], texts: Texts) -> Any:
    """The same as plain JSON."""
    if isinstance(texts, Mapping):
        return sentences_of(classnames, texts)
    return texts if isinstance(texts, str) else list(texts)


def class_texts(classnames: Sequence[str], texts: Texts) -> tuple[list[str], list[int] | None]:
    """The texts of all classes in order, and how many each class has; None for one each. ZooError if one is no text."""
    found = as_sentences(classnames, texts)
    sentences = [text for name in classnames for text in found[name]]
    if unreadable := [text for text in sentences if re.search("[\ud800-\udfff]", text)]:
        raise ZooError(f"CLIP cannot read {unreadable[0]!r}, which is not in UTF-8: rename the class, or its folder.")
    return sentences, None if isinstance(texts, str) else [len(found[name]) for name in classnames]


def same_texts(classnames: Sequence[str], one: Texts, other: Texts) -> bool:
    """Whether the texts of all classes are the same; not if either has none for one."""
    try:
        return class_texts(classnames, one) == class_texts(classnames, other)
    except ZooError:
        return False


def mean_of_texts(features: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Normalised features (S, E) of `class_texts` -> the normalised mean of each class (C, E)."""
    if counts is None:
        return features
    return F.normalize(torch.stack([own.mean(0) for own in features.split(list(counts))]), dim=-1)


@cache
def default_tokenizer() -> Tokenizer:
    """open_clip's BPE tokenizer, used by OpenAI's CLIP models."""
    import open_clip

    return open_clip.tokenizer.SimpleTokenizer()


class PaddedTexts(nn.Module):
    """Some texts, padded at the end: tokens `ids` (c, L), and `ends` (c,), the places that the tower reads."""

    ids: Tensor
    ends: Tensor

    def __init__(self, ids: Tensor, ends: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("ends", ends, persistent=False)


class TextChunks(nn.ModuleList):
    """The texts of all classes in chunks of similar lengths. `ids` (S, L), `ends` (S,) and the number of tokens
    `lengths` (S,) are those of all texts in the order of the classes, for a text tower that shares its prefix only of
    the tokens after the prompts; `inside` are the positions of the prompts."""

    order: Tensor  # (S,), the place of each text after sorting
    start_id: int  # the token before the prompts
    counts: list[int] | None = None  # how many texts each class has; None for one each

    def __init__(self, ids: Tensor, ends: Tensor, lengths: Tensor, inside: slice) -> None:
        by_length = lengths.argsort(stable=True)
        chunks = by_length.split(chunk_sizes(lengths[by_length].tolist()))
        super().__init__(PaddedTexts(ids[rows, : int(lengths[rows[-1]])], ends[rows]) for rows in chunks)
        self.register_buffer("order", by_length.argsort(), persistent=False)
        self.inside = inside

    def by_class(self, features: Sequence[Tensor]) -> Tensor:
        """Normalised features (c, E) of each chunk -> of each class (C, E)."""
        return mean_of_texts(torch.cat(list(features))[self.order], self.counts)


def chunk_sizes(lengths: Sequence[int]) -> list[int]:
    """How many texts are in each chunk, given the lengths of all in ascending order."""
    sizes, tokens = [0], 0
    for length in lengths:
        padded = (sizes[-1] + 1) * length
        if sizes[-1] and (padded > CHUNK_TOKENS or padded - tokens - length > CHUNK_PADDING):
            sizes.append(0)
            tokens = 0
        sizes[-1] += 1
        tokens += length
    return sizes


def tokenize_names(
    classnames: Sequence[str], tokenizer: Tokenizer, tower: Any, n_ctx: int, texts: Texts = NAME
) -> TextChunks:
    """The texts of every class, by default `name.`, to follow `n_ctx` prompts; ZooError if one does not fit."""
    sentences, counts = class_texts(classnames, texts)
    labels = [f"The class name {name!r}" for name in classnames]
    if counts is not None:
        labels = [f"The sentence {sentence!r}" for sentence in sentences]
    # longer than the tower's context, so that long texts are detected instead of cut
    ids = tokenizer(sentences, context_length=4 * tower.length)
    chunks = (_after_prompts if tower.shares_prefix else _whole)(labels, ids, tokenizer, tower, n_ctx)
    chunks.start_id, chunks.counts = int(ids[0, 0]), counts
    return chunks


def _after_prompts(labels: Sequence[str], ids: Tensor, tokenizer: Tokenizer, tower: Any, n_ctx: int) -> TextChunks:
    ends = end_positions(tower.text, ids)  # the number of tokens after the start token
    check_lengths(labels, ends, tower.length - 1 - n_ctx, n_ctx)  # room for name, full stop and end token
    return TextChunks(ids[:, 1:], ends - 1, ends, slice(1, 1 + n_ctx))


def _whole(labels: Sequence[str], ids: Tensor, tokenizer: Tokenizer, tower: Any, n_ctx: int) -> TextChunks:
    start, length, text = start_tokens(tokenizer), tower.length, tower.text
    kind = pool_type(text)
    if getattr(text, "cls_emb", None) is not None:  # CoCa's class token after all others
        ends = torch.full((len(ids),), length - n_ctx)
    elif kind in ("argmax", "eos"):
        ends = end_positions(text, ids)
    else:  # the tower reads its first or its last token, whatever that is
        ends = torch.full((len(ids),), length - 1 - n_ctx if kind == "last" else 0)
    check_lengths(labels, last_tokens(ids) + 1 - start, length - 1 - start - n_ctx, n_ctx)
    filler = ids.new_full((len(ids), n_ctx), int(getattr(text, "pad_id", 0)) + 1)  # replaced by the prompts
    whole = torch.cat([ids[:, :start], filler, ids[:, start : length - n_ctx]], 1)
    ends = ends + n_ctx * (ends >= start)
    return TextChunks(whole, ends, torch.full_like(ends, length), slice(start, start + n_ctx))


def last_tokens(ids: Tensor) -> Tensor:
    """ids (n, L) -> (n,), the position of the last token before the padding, which may be the end token too."""
    return (ids != ids[:, -1:]).long().cumsum(1).argmax(1)


def check_lengths(labels: Sequence[str], lengths: Tensor, room: int, n_ctx: int = 0) -> None:
    """ZooError for the first text that takes more tokens than there is room for next to the prompts."""
    beside, fewer = (f" next to {n_ctx} prompt tokens", " or use fewer prompt tokens (n_ctx)") if n_ctx else ("", "")
    for label, length in zip(labels, lengths.tolist(), strict=True):
        if length > room:
            raise ZooError(f"{label} takes {length} tokens, but only {room} are left{beside}: shorten it{fewer}.")


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
