"""open_clip's text transformer, block by block, with prompts between start token, if there is one, and class name.

- Causal, read at the end token (CLIP): nothing before a class name depends on it, so that start token and prompts are
  computed once for all classes. `PrefixRun`.
- All others (SigLIP, CLIPA, MobileCLIP-S: not causal; CoCa: read at a class token after the padding): every class runs
  all its tokens, in chunks of classes. `FullRun`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.model.names import TextChunks, pool_type
from dcp_zoo.model.towers.blocks import KeyValue, OpenClipBlock, call, checkpointed, missing_parts

Runner = Callable[..., Tensor]


class Start(NamedTuple):
    """What enters `block` without prompts, which depends on frozen weights alone: the start token (1, Dt) of a
    `PrefixRun`, None of a `FullRun`, and the tokens (c, L, Dt) of each chunk of texts."""

    block: int
    prefix: Any
    chunks: list[Tensor]


class TextTower:
    """A text tower block by block; it holds the modules, and no parameters of its own: `text`, the CLIP itself or its
    `.text`. `width` is Dt; `shares_prefix`: whether start token and prompts are the same for every class."""

    def __init__(self, text: Any) -> None:
        self.text = text
        self.blocks = [OpenClipBlock(block) for block in text.transformer.resblocks]
        self.width, self.length = text.positional_embedding.shape[-1], text.context_length
        self.shares_prefix = shares_prefix(text)

    @staticmethod
    def missing(text: Any) -> list[str]:
        """What a text tower lacks to be of this kind."""
        return missing_parts(text.transformer.resblocks) + ["pooling at one token"] * (pool_type(text) == "none")

    @property
    def dtype(self) -> torch.dtype:
        return self.text.token_embedding.weight.dtype

    def begin(
        self, prompts: Tensor, names: TextChunks, run: Runner = call, start: Start | None = None
    ) -> "PrefixRun | FullRun":
        """Class names, as of `names.tokenize_names`, after the prompts (M, Dt): before block 0, or that of `start`.
        `run` calls what is computed per chunk of classes, such as with gradient checkpointing."""
        return (PrefixRun if self.shares_prefix else FullRun)(self, prompts, names, run, start)

    def start(self, names: TextChunks, block: int) -> Start:
        """What enters a block if prompts enter none before."""
        return (prefix_start if self.shares_prefix else full_start)(self, names, block)

    def embed(self, names: TextChunks) -> list[Tensor]:
        """Chunks of texts -> their tokens with positions (c, L, Dt), or (c, L + 1, Dt) with CoCa's class token last."""
        text, first = self.text, names.inside.stop if self.shares_prefix else 0
        chunks = [text.token_embedding(chunk.ids) for chunk in names]
        if (class_token := getattr(text, "cls_emb", None)) is not None:
            chunks = [torch.cat([y, class_token.to(y.dtype).expand(len(y), 1, -1)], 1) for y in chunks]
        return [y + text.positional_embedding[first : first + y.shape[1]] for y in chunks]

    def project(self, pooled: Tensor) -> Tensor:
        """The pooled token of each text (S, Dt) after the last block -> features (S, E), not normalised."""
        pooled, projection = self.text.ln_final(pooled), self.text.text_projection
        if isinstance(projection, nn.Linear):
            pooled = projection(pooled)
        elif projection is not None:
            pooled = pooled @ projection
        return pooled


def shares_prefix(text: object) -> bool:
    """Whether a text tower is causal and read at the end token."""
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    return causal and pool_type(text) in ("argmax", "eos")


def prompted_text(tower: TextTower, names: TextChunks, prompts: Sequence[Tensor], call: Runner = call) -> Tensor:
    """Chunks of class names after the prompts (M, Dt) that enter the first blocks -> features (C, E). After the last of
    `prompts`, the blocks' outputs continue as prompts."""
    run = tower.begin(prompts[0], names, call)
    for i in range(len(tower.blocks)):
        if 1 <= i < len(prompts):
            run.replace(prompts[i])
        run.step()
    return run.features()


class PrefixRun:
    """A causal tower on start token and prompts, y (1 + M, Dt), whose keys and values (H, 1 + M, d) in the blocks so
    far are `prefix`; class names follow in `features`."""

    def __init__(self, tower: TextTower, prompts: Tensor, names: TextChunks, run: Runner, start: Start | None) -> None:
        self.tower, self.names, self._run, self.start = tower, names, run, start
        self.blocks = tower.blocks[start.block if start else 0 :]
        self.y: Tensor = start.prefix if start else embed_prefix(tower.text, prompts, names.start_id)
        self.prefix: list[KeyValue] = []
        if start:
            self.replace(prompts)

    def prompts(self, pooling: str) -> Tensor:
        """The prompts (M, Dt), the same for every class, so that pooling them over the classes changes nothing."""
        return self.y[1:]

    def replace(self, prompts: Tensor) -> None:
        self.y = torch.cat([self.y[:1], prompts.to(self.y.dtype)])

    def step(self) -> None:
        """One block."""
        i, blocks = len(self.prefix), self.blocks
        self.y, key_value = prefix_block(blocks[i], self.y, last=i == len(blocks) - 1)
        self.prefix.append(key_value)

    def features(self) -> Tensor:
        """After the last block -> normalised features (C, E)."""
        entering = self.start.chunks if self.start else self.tower.embed(self.names)
        pairs = zip(self.names, entering, strict=True)
        return self.names.by_class([self._run(name_features, self.tower, y, n.ends, self.prefix) for n, y in pairs])


def prefix_start(tower: TextTower, names: TextChunks, block: int) -> Start:
    y = embed_prefix(tower.text, tower.text.token_embedding.weight[:0], names.start_id)
    chunks = tower.embed(names)
    for early in tower.blocks[:block]:
        y, prefix = prefix_block(early, y)
        chunks = [name_block(early, x, prefix) for x in chunks]
    return Start(block, y, chunks)


def embed_prefix(text: Any, prompts: Tensor, start_id: int) -> Tensor:
    """prompts (M, Dt) -> y (P, Dt), P = 1 + M: the start token and the prompts, shared by all classes."""
    table = text.token_embedding.weight
    y = torch.cat([table[start_id : start_id + 1], prompts.to(table.dtype)])
    return y + text.positional_embedding[: len(y)]


def prefix_block(block: OpenClipBlock, y: Tensor, last: bool = False) -> tuple[Tensor, KeyValue]:
    """One causal block on the shared prefix y (P, Dt) -> y after it, unless it is the last, and the keys and values
    that names attend to: causality makes them the same for every class."""
    normed = block.norm(y)
    key, value = block.key_value(normed)
    if not last:
        query = block.query(normed)
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)  # ONNX needs 4-D
        y = block.finish(y, attended[0])
    return y, (key, value)


def name_features(tower: TextTower, y: Tensor, ends: Tensor, prefix: Sequence[KeyValue]) -> Tensor:
    """The last blocks on class names y (c, L, Dt), given the prefix's keys and values in each of these blocks ->
    normalised features (c, E), read at `ends` (c,)."""
    blocks = tower.blocks[-len(prefix) :]
    for block, key_value in zip(blocks, prefix, strict=True):
        y = name_block(block, y, key_value, ends if block is blocks[-1] else None)
    return F.normalize(tower.project(y[:, 0]), dim=-1)


def name_block(block: OpenClipBlock, y: Tensor, prefix: KeyValue, ends: Tensor | None = None) -> Tensor:
    """One block on class names: y (c, L, Dt) -> (c, L, Dt), or only the tokens at `ends` (c,) -> (c, 1, Dt)."""
    normed = block.norm(y)
    own, length = block.key_value(normed), y.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=y.device).tril()
    if ends is not None:
        rows = torch.arange(len(y), device=y.device)
        y, normed, past = y[rows, ends][:, None], normed[rows, ends][:, None], past[ends][:, None, None]
    return block.finish(y, attend_names(block.query(normed), own, prefix, past))


def attend_names(query: Tensor, own: KeyValue, prefix: KeyValue, past: Tensor) -> Tensor:
    """Attention of name tokens (c, H, Q, d) to the shared prefix (H, P, d) and, where `past`, to their own name (c, H,
    L, d). The prefix is not copied for every name, as torch's attention would: its scores are one product for all."""
    (key, value), (prefix_key, prefix_value) = own, prefix
    query = query * query.shape[-1] ** -0.5
    to_prefix = torch.einsum("chqd,hpd->chqp", query, prefix_key)
    to_name = (query @ key.transpose(-2, -1)).masked_fill(~past, float("-inf"))
    weights = torch.cat([to_prefix, to_name], -1).softmax(-1).to(value.dtype)
    to_prefix, to_name = weights.split([to_prefix.shape[-1], to_name.shape[-1]], -1)
    return torch.einsum("chqp,hpd->chqd", to_prefix, prefix_value) + to_name @ value


class FullRun:
    """Any other tower: all tokens of every class, y (c, L, Dt) for each chunk of c classes. With gradients and several
    chunks, each block recomputes its activations in the backward pass."""

    def __init__(self, tower: TextTower, prompts: Tensor, names: Any, run: Runner, start: Start | None) -> None:
        self.tower, self.names = tower, names
        self._run = checkpointed if len(names) > 1 else run
        self.inside = inside = names.inside
        self.masks = [attention_mask(tower.text, chunk.ids) for chunk in names]
        self.blocks = iter(tower.blocks[start.block if start else 0 :])
        self.chunks = start.chunks if start else tower.embed(names)
        self.replace(prompts if start else prompts.to(tower.dtype) + tower.text.positional_embedding[inside])

    def prompts(self, pooling: str) -> Tensor:
        """The prompts (M, Dt), pooled over all classes, as the vision prompts are over the batch."""
        t = torch.cat([y[:, self.inside] for y in self.chunks])
        if pooling == "mean":
            return t.mean(0)
        return t.amax(0) if pooling == "max" else t[0]

    def replace(self, prompts: Tensor) -> None:
        """New prompts (M, Dt), the same for every class."""
        first, last = self.inside.start, self.inside.stop
        self.chunks = [
            torch.cat([y[:, :first], prompts.to(y.dtype).expand(len(y), -1, -1), y[:, last:]], 1) for y in self.chunks
        ]

    def step(self) -> None:
        """One block."""
        block = next(self.blocks)
        self.chunks = [self._run(block, y, mask) for y, mask in zip(self.chunks, self.masks, strict=True)]

    def features(self) -> Tensor:
        """After the last block -> normalised features (C, E)."""
        pairs = zip(self.chunks, self.names, strict=True)
        pooled = [y[torch.arange(len(y), device=y.device), chunk.ends] for y, chunk in pairs]
        return self.names.by_class([F.normalize(self.tower.project(y), dim=-1) for y in pooled])


def full_start(tower: TextTower, names: Any, block: int) -> Start:
    chunks = tower.embed(names)
    for n, chunk in enumerate(names):
        shown = torch.ones(chunks[n].shape[1], dtype=torch.bool, device=chunks[n].device)
        shown[names.inside] = False
        mask = attention_mask(tower.text, chunk.ids)
        own = torch.diag(~shown)  # a prompt's place attends to itself: softmax needs one token
        mask = (shown if mask is None else mask & shown) | own
        for early in tower.blocks[:block]:
            chunks[n] = early(chunks[n], mask)
    return Start(block, None, chunks)


def attention_mask(text: Any, ids: Tensor) -> Tensor | None:
    """True where a token may attend to another, (L, L) or (C, 1, L, L); None if everywhere. CoCa's class token hides
    padding, in the order of open_clip's weights: a token hides the one after it."""
    causal = getattr(text, "attn_mask", None)
    mask = None if causal is None else causal == 0
    if getattr(text, "cls_emb", None) is None and not getattr(text, "use_pad_mask", False):
        return mask
    shown = ids != text.pad_id
    if getattr(text, "cls_emb", None) is not None:
        always = torch.ones_like(shown[:, :1])
        shown = torch.cat([shown, always] if getattr(text, "correct_cls_mask", False) else [always, shown], 1)
    keys = shown[:, None, None, :]  # (C, 1, 1, L)
    return keys.expand(-1, -1, shown.shape[1], -1) if mask is None else keys & mask[: shown.shape[1], : shown.shape[1]]
