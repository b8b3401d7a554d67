"""open_clip's text transformer, block by block, with prompts between start token, if there is one, and class
name.

- Causal, read at the end token (CLIP): nothing before a class name depends on it, so that start token and
  prompts are computed once for all classes. `PrefixRun`.
- All others (SigLIP, CLIPA, MobileCLIP-S: not causal; CoCa: read at a class token after the padding): every
  class runs all its tokens, in chunks of classes. `FullRun`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone._torch import pool
from dcp_zoo.backbone.classes import mean_of_texts
from dcp_zoo.backbone.tokens import check_lengths, end_positions, last_tokens, pool_type
from dcp_zoo.backbone.towers.open_clip import KeyValue, OpenClipBlock, run

CHUNK_TOKENS = 1024  # the most tokens of class names that are computed at once
CHUNK_PADDING = 64  # the most of them that are padding


class PaddedTexts(nn.Module):
    """Some texts, padded at the end: tokens `ids` (c, L), and the positions `ends` (c,) that the tower
    reads."""

    def __init__(self, ids: Tensor, ends: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("ends", ends, persistent=False)


class TextChunks(nn.ModuleList):
    """The texts of all classes in chunks of similar lengths.

    Args:
        ids, ends: (S, L) and (S,), as of `PaddedTexts`, of all texts in the order of the classes; for a text
            tower that shares its prefix, of the tokens after the prompts alone.
        lengths: (S,), the number of tokens.
        prompts: their positions.
    """

    order: Tensor  # (S,), the position of each text after sorting
    start_id: int  # the token before the prompts
    counts: list[int] | None = None  # how many texts each class has; None for one each

    def __init__(self, ids: Tensor, ends: Tensor, lengths: Tensor, prompts: slice) -> None:
        by_length = lengths.argsort(stable=True)
        chunks = by_length.split(chunk_sizes(lengths[by_length].tolist()))
        super().__init__(PaddedTexts(ids[rows, : int(lengths[rows[-1]])], ends[rows]) for rows in chunks)
        self.register_buffer("order", by_length.argsort(), persistent=False)
        self.prompts = prompts

    def by_class(self, features: Sequence[Tensor]) -> Tensor:
        """Normalised features (c, E) of each chunk -> of each class (C, E)."""
        return mean_of_texts(torch.cat(list(features))[self.order], self.counts)


def chunk_sizes(lengths: Sequence[int]) -> list[int]:
    """How many texts are in each chunk, given the lengths of all in ascending order."""
    sizes = [0]
    tokens = 0  # of the last chunk, without padding
    for length in lengths:
        padded = (sizes[-1] + 1) * length
        if sizes[-1] and (padded > CHUNK_TOKENS or padded - tokens - length > CHUNK_PADDING):
            sizes.append(0)
            tokens = 0
        sizes[-1] += 1
        tokens += length
    return sizes


class TextTower:
    """A text tower block by block; it holds the modules, and no parameters of its own: `text`, the CLIP
    itself or its `.text`. `width` is Dt; `shares_prefix`: whether start token and prompts are the same for
    every class; `recomputes`: whether activations are computed again in the backward pass."""

    recomputes = False

    def __init__(self, text: Any) -> None:
        self.text = text
        self.blocks = [OpenClipBlock(block) for block in text.transformer.resblocks]
        self.width = text.positional_embedding.shape[-1]
        self.length = text.context_length
        self.pooling = pool_type(text)
        self.shares_prefix = shares_prefix(text)

    @property
    def class_token(self) -> Tensor | None:
        """CoCa's, which follows all other tokens."""
        return getattr(self.text, "cls_emb", None)

    def chunks(self, texts: Sequence[str], ids: Tensor, n_ctx: int, start: int) -> TextChunks:
        """Tokens (S, L) of texts, of which the first `start` come before the prompts, to follow `n_ctx`
        prompts; ZooError if a text does not fit."""
        prompts = slice(start, start + n_ctx)
        if self.shares_prefix:
            ends = end_positions(self.text, ids)  # the number of tokens after the start token
            check_lengths(texts, ends, self.length - 1 - n_ctx, n_ctx)  # of name, full stop and end token
            return TextChunks(ids[:, 1:], ends - 1, ends, prompts)
        length = self.length - n_ctx  # of a text without prompts, as `ends` until they are inserted
        if self.class_token is None and self.pooling in ("argmax", "eos"):
            ends = end_positions(self.text, ids)
        else:  # the tower reads a class token after all others, or its first or its last token, whatever that is
            last = length - 1 if self.pooling == "last" else 0
            ends = torch.full((len(ids),), last if self.class_token is None else length)
        check_lengths(texts, last_tokens(ids) + 1 - start, length - 1 - start, n_ctx)
        filler = ids.new_full((len(ids), n_ctx), int(getattr(self.text, "pad_id", 0)) + 1)  # replaced by the prompts
        ids = torch.cat([ids[:, :start], filler, ids[:, start:length]], 1)
        ends = ends + n_ctx * (ends >= start)
        return TextChunks(ids, ends, torch.full_like(ends, self.length), prompts)

    def begin(self, prompts: Tensor, names: TextChunks) -> "TextRun":
        """Class names, as of `chunks`, after the prompts (M, Dt), before the first block."""
        prompts = prompts.to(self.text.token_embedding.weight.dtype) + self.text.positional_embedding[names.prompts]
        return (PrefixRun if self.shares_prefix else FullRun)(self, prompts, names)

    def embed(self, names: TextChunks) -> list[Tensor]:
        """Chunks of texts -> their tokens with positions (c, L, Dt), or (c, L + 1, Dt) with CoCa's class
        token last."""
        start = names.prompts.stop if self.shares_prefix else 0
        embedded = []
        for chunk in names:
            y = self.text.token_embedding(chunk.ids)
            if self.class_token is not None:
                y = torch.cat([y, self.class_token.to(y.dtype).expand(len(y), 1, -1)], 1)
            embedded.append(y + self.text.positional_embedding[start : start + y.shape[1]])
        return embedded

    def project(self, pooled: Tensor) -> Tensor:
        """The pooled token of each text (S, Dt) after the last block -> features (S, E), not normalised."""
        pooled = self.text.ln_final(pooled)
        projection = self.text.text_projection
        if isinstance(projection, nn.Linear):
            pooled = projection(pooled)
        elif projection is not None:
            pooled = pooled @ projection
        return pooled


def shares_prefix(text: object) -> bool:
    """Whether a text tower is causal and read at the end token."""
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    return causal and pool_type(text) in ("argmax", "eos")


def prompted_text(tower: TextTower, names: TextChunks, prompts: Sequence[Tensor]) -> Tensor:
    """Chunks of class names after the prompts (M, Dt) that enter the first blocks -> features (C, E). After
    the last of `prompts`, the blocks' outputs continue as prompts."""
    text = tower.begin(prompts[0], names)
    for i in range(len(tower.blocks)):
        if 1 <= i < len(prompts):
            text.replace(prompts[i])
        text.step()
    return text.features()


class PrefixRun:
    """A causal tower on start token and prompts, y (1 + M, Dt), whose keys and values (H, 1 + M, d) in the
    blocks so far are `prefix`; class names follow in `features`."""

    def __init__(self, tower: TextTower, prompts: Tensor, names: TextChunks) -> None:
        self.tower = tower
        self.names = names
        text = tower.text
        self.y = text.token_embedding.weight[names.start_id][None] + text.positional_embedding[:1]
        self.prefix: list[KeyValue] = []
        self.replace(prompts)

    def prompts(self, pooling: str) -> Tensor:
        """The prompts (M, Dt), the same for every class, so that pooling them over the classes changes
        nothing."""
        return self.y[1:]

    def replace(self, prompts: Tensor) -> None:
        self.y = torch.cat([self.y[:1], prompts.to(self.y.dtype)])

    def step(self) -> None:
        """One block."""
        block = self.tower.blocks[len(self.prefix)]
        self.prefix.append(block.key_value(block.norm(self.y)))  # causality makes them the same for every class
        if block is not self.tower.blocks[-1]:
            self.y = block(self.y[None], causal=True)[0]

    def features(self) -> Tensor:
        """After the last block -> normalised features (C, E)."""
        features = []
        for chunk, y in zip(self.names, self.tower.embed(self.names), strict=True):
            features.append(run(self.tower.recomputes, name_features, self.tower, y, chunk.ends, self.prefix))
        return self.names.by_class(features)


def name_features(tower: TextTower, y: Tensor, ends: Tensor, prefix: Sequence[KeyValue]) -> Tensor:
    """All blocks on class names y (c, L, Dt), given the prefix's keys and values in each -> normalised
    features (c, E), read at `ends` (c,)."""
    for block, key_value in zip(tower.blocks, prefix, strict=True):
        y = name_block(block, y, key_value, ends if block is tower.blocks[-1] else None)
    return F.normalize(tower.project(y[:, 0]), dim=-1)


def name_block(block: OpenClipBlock, y: Tensor, prefix: KeyValue, ends: Tensor | None = None) -> Tensor:
    """One block on class names: y (c, L, Dt) -> (c, L, Dt), or only the tokens at `ends` (c,) -> (c, 1,
    Dt)."""
    normed = block.norm(y)
    own = block.key_value(normed)
    length = y.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=y.device).tril()
    if ends is not None:
        rows = torch.arange(len(y), device=y.device)
        y = y[rows, ends][:, None]
        normed = normed[rows, ends][:, None]
        past = past[ends][:, None, None]
    return block.finish(y, attend_names(block.query(normed), own, prefix, past))


def attend_names(query: Tensor, own: KeyValue, prefix: KeyValue, past: Tensor) -> Tensor:
    """Attention of name tokens (c, H, Q, d) to the shared prefix (H, P, d) and, where `past`, to their own
    name (c, H, L, d). The prefix is not copied for every name, as torch's attention would: its scores are
    one product for all."""
    key, value = own
    prefix_key, prefix_value = prefix
    query = query * query.shape[-1] ** -0.5
    to_prefix = torch.einsum("chqd,hpd->chqp", query, prefix_key)
    to_name = (query @ key.transpose(-2, -1)).masked_fill(~past, float("-inf"))
    weights = torch.cat([to_prefix, to_name], -1).softmax(-1).to(value.dtype)
    to_prefix, to_name = weights.split([to_prefix.shape[-1], to_name.shape[-1]], -1)
    return torch.einsum("chqp,hpd->chqd", to_prefix, prefix_value) + to_name @ value


class FullRun:
    """Any other tower: all tokens of every class, y (c, L, Dt) for each chunk of c classes. With gradients
    and several chunks, each block recomputes its activations in the backward pass."""

    def __init__(self, tower: TextTower, prompts: Tensor, names: Any) -> None:
        self.tower = tower
        self.names = names
        self.masks = [attention_mask(tower, chunk.ids) for chunk in names]
        self.blocks = iter(tower.blocks)
        self.chunks = tower.embed(names)
        self.replace(prompts)

    def prompts(self, pooling: str) -> Tensor:
        """The prompts (M, Dt), pooled over all classes, as the vision prompts are over the batch."""
        return pool(torch.cat([y[:, self.names.prompts] for y in self.chunks]), pooling)

    def replace(self, prompts: Tensor) -> None:
        """New prompts (M, Dt), the same for every class."""
        before = slice(self.names.prompts.start)
        after = slice(self.names.prompts.stop, None)
        for i, y in enumerate(self.chunks):
            self.chunks[i] = torch.cat([y[:, before], prompts.to(y.dtype).expand(len(y), -1, -1), y[:, after]], 1)

    def step(self) -> None:
        """One block."""
        block = next(self.blocks)
        again = self.tower.recomputes or len(self.chunks) > 1
        self.chunks = [run(again, block, y, mask) for y, mask in zip(self.chunks, self.masks, strict=True)]

    def features(self) -> Tensor:
        """After the last block -> normalised features (C, E)."""
        features = []
        for y, chunk in zip(self.chunks, self.names, strict=True):
            pooled = y[torch.arange(len(y), device=y.device), chunk.ends]
            features.append(F.normalize(self.tower.project(pooled), dim=-1))
        return self.names.by_class(features)


TextRun = PrefixRun | FullRun


def attention_mask(tower: TextTower, ids: Tensor) -> Tensor | None:
    """True where a token may attend to another, (L, L) or (C, 1, L, L); None if everywhere. CoCa's class
    token hides padding, in the order of open_clip's weights: a token hides the one after it."""
    text = tower.text
    causal = getattr(text, "attn_mask", None)
    mask = None if causal is None else causal == 0
    if tower.class_token is None and not getattr(text, "use_pad_mask", False):
        return mask
    shown = ids != text.pad_id
    if tower.class_token is not None:
        always = torch.ones_like(shown[:, :1])
        is_correct = getattr(text, "correct_cls_mask", False)
        shown = torch.cat([shown, always] if is_correct else [always, shown], 1)
    length = shown.shape[1]
    keys = shown[:, None, None, :].expand(-1, -1, length, -1)  # (C, 1, L, L)
    return keys if mask is None else keys & mask[:length, :length]
