"""DCP: a frozen CLIP whose prompts rewrite each other between blocks (DCP, ACL Findings 2023, arXiv
2305.17903), by Cross-Modal Prompt Attention (CMPA), the small trained module between its towers.

Shapes: B images, C classes, M prompt tokens, K coupled blocks, widths Dv (vision) and Dt (text), E
embedding.

Stored statistics are this project's own. In the paper CMPA reads vision prompts that are pooled over the
batch, so that the logits of an image depend on the other images of its batch. As in BatchNorm, that is so in
training alone: `store_stats` pools once over all training images, and keeps the pooled vision prompts v_i
(M, Dv) before each coupled block i as `stored_stats` (K, M, Dv). With these neither the text features nor
the prompts that enter the image tower depend on the images: both are computed once per set of classes, and
the head can be fused, exported, and given a text probe.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from timm.layers import LayerNormFp32  # computes in float32 and returns the input's dtype
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone._torch import in_eval_mode, pool_stream
from dcp_zoo.backbone.classes import NAME, TEMPLATE, Texts, check_classnames
from dcp_zoo.backbone.clip import FrozenCLIP, WeightAndBias, joined, linear_of, parts_of
from dcp_zoo.backbone.inputs import Images, Inputs
from dcp_zoo.backbone.tokens import Tokenizer
from dcp_zoo.backbone.towers.open_clip import ImageRun
from dcp_zoo.backbone.towers.text import TextChunks, TextRun
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import Abilities, DCPConfig, HeadConfig, own_names
from dcp_zoo.heads.head import Head

KEPT_BYTES = 2**31  # of tokens that `store_stats` keeps: 3,500 images of ViT-B/16 in float32
STATS_MODES = ("batch", "stored")
NO_STATS = 'stats="stored" needs stored statistics: call model.store_stats(images) first.'
HEAD_WIDTH = 64  # of the attention heads in both CLIP towers, and therefore in CMPA
# of each coupling, the towers whose prompts are rewritten, and the tower whose prompts they are rewritten
# from
REWRITTEN_FROM = {
    "bidirectional": {"vision": "text", "text": "vision"},
    "text_to_vision": {"vision": "text"},
    "vision_to_text": {"text": "vision"},
    "self": {"vision": "vision", "text": "text"},
    "none": {},
}


class PromptAttention(nn.Module):
    """Rewrites the prompts p (M, D) of one tower from the prompts q (M, D') of the other tower, or from p
    itself where the coupling is self:

        Q  = LN1(W q + b)          KV = LN1(p)           (M, D) each, by the same norm
        x  = p + MultiHead(Q, KV, KV)                    D / 64 attention heads
        p' = x + MLP(LN2(x))                             (M, D)

    ZooError if D is no multiple of 64.
    """

    def __init__(self, dim: int, other_dim: int) -> None:
        super().__init__()
        if dim % HEAD_WIDTH:
            raise ZooError(f"CMPA needs tower widths that are multiples of {HEAD_WIDTH}, but this CLIP has {dim}.")
        self.query = nn.Linear(other_dim, dim)
        self.norm1 = LayerNormFp32(dim, eps=1e-5)
        self.attn = nn.MultiheadAttention(dim, dim // HEAD_WIDTH, batch_first=True)
        self.norm2 = LayerNormFp32(dim, eps=1e-5)
        c_fc = nn.Linear(dim, 4 * dim)
        c_proj = nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        """own (M, D), other (M, other_dim) -> the new prompts (M, D)."""
        x = own + self.attend(own, other, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))

    def attend(self, own: Tensor, other: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        """What attention adds to own (M, D), and with `need_weights` how much each prompt attends to each."""
        key = self.norm1(own)  # and value
        return self.attn(self.norm1(self.query(other)), key, key, **options)


class CMPA(nn.Module):
    """The prompt attention of each tower whose prompts a coupling rewrites, see `REWRITTEN_FROM`; the other
    tower has none, which would never be trained."""

    def __init__(self, vision_width: int, text_width: int, rewritten_from: Mapping[str, str]) -> None:
        super().__init__()
        self.rewritten_from = rewritten_from
        widths = {"vision": vision_width, "text": text_width}
        attentions = {tower: PromptAttention(widths[tower], widths[source]) for tower, source in rewritten_from.items()}
        self.to_vision = attentions.get("vision")
        self.to_text = attentions.get("text")

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Pooled vision prompts v (M, Dv) and text prompts t (M, Dt) -> both rewritten; None for those that
        are not."""
        new = {tower: attention(own, other) for tower, attention, own, other in self.inputs(v, t)}
        return new.get("vision"), new.get("text")

    def inputs(self, v: Tensor, t: Tensor) -> Iterator[tuple[str, Any, Tensor, Tensor]]:
        """Of each such tower its attention, its own prompts, and those that they are rewritten from."""
        prompts = {"vision": v, "text": t}
        for tower, source in self.rewritten_from.items():
            yield tower, getattr(self, f"to_{tower}"), prompts[tower], prompts[source]


class StoredPrompts:
    """In place of an image tower, where statistics are stored: the pooled vision prompts (M, Dv) before each
    coupled block, `stats`. It notes the prompts (M, Dv) that newly enter the first blocks, `entering`."""

    def __init__(self, stats: list[Tensor]) -> None:
        self.stats = stats
        self.entering: list[Tensor] = []
        self.done = 0  # blocks so far

    def prompts(self, pooling: str) -> Tensor:
        return self.stats[self.done - 1]

    def replace(self, prompts: Tensor) -> None:
        self.entering.append(prompts)

    def step(self) -> None:
        self.done += 1


class MeasuredPrompts(StoredPrompts):
    """Measures the statistics of images, which come in chunks and count as one batch. A chunk runs through a
    block when the prompts after it are asked for. Its tokens are kept for the next block, or, if those of all
    chunks take more than `KEPT_BYTES`, are computed again from the images.

    Args:
        encoder: a CLIP.
        chunks: batches of images, or (images, labels) pairs, which can be read again.
    """

    def __init__(self, encoder: FrozenCLIP, chunks: Iterable[Any]) -> None:
        super().__init__([])
        self.encoder = encoder
        self.chunks = chunks
        # of each chunk, the tokens after the last block that it ran through, which take as much room after each
        self.kept: list[Tensor] = []
        self.has_room = True

    def prompts(self, pooling: str) -> Tensor:
        self.stats.append(pool_stream(self._leaving(), pooling))
        return self.stats[-1]

    def _leaving(self) -> Iterator[Tensor]:
        """The prompts (b, M, Dv) of each chunk that leave the blocks so far."""
        tower = self.encoder.vision_tower
        start = self.done - 1 if self.kept else 0
        new_prompts = self.entering[start:]
        for i, x in enumerate(list(self.kept) or self._embedded()):
            own = x[:, : tower.num_tokens] if new_prompts else x
            x = tower.run(own, new_prompts, start, self.done)
            if self.has_room:
                self.kept[i : i + 1] = [x]
                self.has_room = sum(tokens.nbytes for tokens in self.kept) <= KEPT_BYTES
            if not self.has_room:
                self.kept.clear()
            yield x[:, tower.num_tokens :].float()

    def _embedded(self) -> Iterator[Tensor]:
        """The tokens (b, N, Dv) of each chunk before the first block."""
        for chunk in self.chunks:
            images = chunk[0] if isinstance(chunk, (tuple, list)) else chunk
            yield self.encoder.enter(images.to(self.encoder.device)).x


class DCP(Head):
    """A CLIP classifier with deeply coupled prompts. Only the prompts and CMPA require gradients. ZooError
    for an unsupported CLIP, an unknown option or choice, or class names that are empty or too long.

    Args:
        clip: an open_clip CLIP with a vision transformer, taken as it is, or a `FrozenCLIP`; widths and
            depths are read from it.
        classnames: one name per class; underscores are read as spaces.
        config: the options; or give them one by one, as `n_ctx=4, depth=3`. See `DCPConfig`.
        tokenizer: open_clip tokenizer of `clip`. Default: open_clip's own BPE tokenizer.
        texts: sentences of each class, see `set_classnames`.
    """

    kind = "dcp"
    name_tokens: TextChunks

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        config: DCPConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        texts: Texts = TEMPLATE,
        **options: object,
    ) -> None:
        super().__init__(clip if isinstance(clip, FrozenCLIP) else FrozenCLIP(clip, tokenizer))
        self.method = "dcp"
        self.abilities = Abilities(coupled=True)
        self.config = config = DCPConfig.from_options((config.as_dict() if config else {}) | options)
        self.model_args = config.as_dict()
        vision = self.encoder.vision_tower
        text = self.encoder.text_tower
        n_ctx = config.n_ctx
        initial = {"text": 0.02 * torch.randn(n_ctx, text.width), "vision": 0.02 * torch.randn(n_ctx, vision.width)}
        self.template = NAME  # follows the text prompts
        if config.ctx_init and n_ctx <= 4:
            initial["text"] = self.encoder.embed_words(config.ctx_init, n_ctx)
            self.template = " ".join([*config.ctx_init.split()[n_ctx:], NAME])
        self.prompts = nn.ParameterDict(initial).to(self.device)
        self.rewritten_from = REWRITTEN_FROM[config.coupling]
        self.num_coupled = min(config.depth, len(vision.blocks) - 1, len(text.blocks) - 1)  # K
        modules = 1 if config.share_cmpa else self.num_coupled
        if not self.rewritten_from:
            self.num_coupled = 0
            modules = 0
        cmpa = [CMPA(vision.width, text.width, self.rewritten_from) for _ in range(modules)]
        self.cmpa = nn.ModuleList(cmpa).to(self.device)
        self.stored_stats: Tensor | None  # (K, M, Dv), see `store_stats`
        self.register_buffer("stored_stats", None)
        self._set_method_classes(check_classnames(classnames), texts)
        self.stats = None

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "DCP":
        """The head of a checkpoint, by its `config.json`, which `load_head` then loads."""
        options = DCPConfig.from_options(config["model_args"])
        return cls(clip, own_names(config), options, texts=config["dcp"]["texts"])

    def forward(self, images: Images) -> Tensor:
        """Images (B, 3, H, W), normalised as `create_transform` does, or other `Inputs` -> logits (B, C),
        without classes features."""
        if self.num_classes == 0 or self.fc is not None or self.stats == "stored":
            return super().forward(images)
        features, text = self.encode(images)
        if self.text_probe is None:
            return self.encoder.logits(features, text)
        readings = self.readings
        readings[0] = replace(readings[0], linear=lambda: self.encoder.scaled(text))
        weight, bias = linear_of(readings)
        f = joined([features, *(reading.encode(images) for reading in readings[1:])], parts_of(readings))
        with torch.autocast(f.device.type, enabled=False):
            return self.text_probe(F.linear(f.to(weight.dtype), weight, bias), f, self.classes)

    def encode(self, images: Images) -> tuple[Tensor, Tensor]:
        """Images, one batch -> normalised features of the images (B, E) and of the classes (C, E)."""
        if self.stats == "stored":  # the towers need not run side by side
            prompts, text_features = self._constants()
            return self.encoder.encode_image(images, prompts), text_features
        vision = ImageRun(self.encoder.vision_tower, self.encoder.enter(images).x, pooled_only=True)
        *_, text = self.couple(vision)
        return self.encoder.vision_tower.features(vision.x), text.features()

    def _encode_prompted(self, images: Images) -> Tensor:
        return self.encode(images)[0]

    def couple(self, vision: ImageRun | StoredPrompts) -> Iterator[TextRun]:
        """The loop of the method: runs the prompts of both towers block by block, and rewrites them from each
        other. With the pooled vision prompts v (M, Dv) and text prompts t (M, Dt) before block i = 1 .. K:

            v', t' = CMPA.to_vision(v, t), CMPA.to_text(t, v)           bidirectional
            v'     = CMPA.to_vision(v, t)                               text_to_vision
                t' =                       CMPA.to_text(t, v)           vision_to_text
            v', t' = CMPA.to_vision(v, v), CMPA.to_text(t, t)           self

        Prompts that are not rewritten flow on as their tower leaves them; with the coupling none, all do,
        and K = 0. v is pooled over the batch, t over the classes: in a causal text tower t is the same for
        every class, as the prompts precede the names.

        It yields the text tower after each block, and `vision` then is after the same block.
        """
        vision_tower = self.encoder.vision_tower
        text_tower = self.encoder.text_tower
        vision.replace(vision_tower.embed_prompts(self.prompts["vision"]))
        text = text_tower.begin(self.prompts["text"], self.name_tokens)
        for i in range(max(len(vision_tower.blocks), len(text_tower.blocks))):
            if 1 <= i <= self.num_coupled:
                new_v, new_t = self._cmpa_of(i)(*self._pooled(vision, text))
                if new_v is not None:
                    vision.replace(new_v)
                if new_t is not None:
                    text.replace(new_t)
            if i < len(vision_tower.blocks):
                vision.step()
            if i < len(text_tower.blocks):
                text.step()
            yield text

    def _pooled(self, vision: ImageRun | StoredPrompts, text: TextRun) -> tuple[Tensor, Tensor]:
        """What CMPA reads: v (M, Dv) and t (M, Dt)."""
        v = vision.prompts(self.config.pooling)
        t = text.prompts(self.config.pooling)
        return v.to(self.prompts["vision"].dtype), t.to(self.prompts["text"].dtype)

    def _cmpa_of(self, i: int) -> Any:
        return self.cmpa[0 if self.config.share_cmpa else i - 1]

    def read_by_cmpa(self) -> Iterator[tuple[CMPA, Tensor, Tensor]]:
        """The CMPA of each coupled block, and what it reads in the stored statistics: the pooled vision
        prompts (M, Dv) and text prompts (M, Dt). ZooError without statistics."""
        if not self.has_stats:
            raise ZooError(NO_STATS)
        vision = self._stored()
        for i, text in enumerate(islice(self.couple(vision), self.num_coupled), 1):
            yield self._cmpa_of(i), *self._pooled(vision, text)

    @property
    def has_stats(self) -> bool:
        """Whether there are stored statistics; with K = 0 none are needed, as CMPA reads no prompts."""
        return self.stored_stats is not None or self.num_coupled == 0

    @property
    def text_reads_images(self) -> bool:
        """Whether text prompts are rewritten from vision prompts."""
        return self.num_coupled > 0 and self.rewritten_from.get("text") == "vision"

    def _block_outputs(self, images: Images) -> Iterator[Tensor]:
        if self.stats == "stored":
            yield from super()._block_outputs(images)
            return
        vision = ImageRun(self.encoder.vision_tower, self.encoder.enter(images).x)
        for _ in self.couple(vision):
            yield vision.x

    @torch.compiler.disable  # reads texts, and is kept
    def _constants(self) -> tuple[list[Tensor], Tensor]:
        """Copies of what depends on no image in the stored statistics: the `image_prompts` (M, Dv), and the
        text features (C, E); computed again when a weight changes, see `WeightCache`."""
        tensors = [*self.parameters(), *self.buffers()]
        prompts, text_features = self._text_cache(self._run_text, tensors, self.name_tokens)
        return [p.clone() for p in prompts], text_features.clone()

    def _run_text(self) -> tuple[list[Tensor], Tensor]:
        vision = self._stored()
        *_, text = self.couple(vision)
        return vision.entering, text.features()

    def _stored(self) -> StoredPrompts:
        """In place of the image tower. Without statistics only where neither text nor CMPA read any."""
        if self.stored_stats is None:
            assert not self.text_reads_images
            return StoredPrompts([self.prompts["vision"]] * self.num_coupled)
        return StoredPrompts([*self.stored_stats])

    @property
    def stats_modes(self) -> tuple[str, ...]:
        if self.num_coupled == 0:
            return ("stored",)  # those of a batch would be the same
        return ("stored", "batch") if self.has_stats else ("batch",)

    @property
    def stats(self) -> str:
        """The pooled vision prompts that CMPA reads: those of the batch ("batch": always in training), or of
        `store_stats` ("stored", the default once there are any); see the module."""
        return "batch" if self.training or not self.has_stats or self._stats == "batch" else "stored"

    @stats.setter
    def stats(self, stats: str | None) -> None:
        check_choice("stats", stats, (None, *STATS_MODES))
        if stats == "stored" and not self.has_stats:
            raise ZooError(NO_STATS)
        self._stats = stats

    @torch.no_grad()
    def store_stats(self, images: Images | Iterable[Any]) -> None:
        """Measure and store the statistics, so that logits depend on no batch. ZooError for no images or an
        iterator.

        All images count as one batch, in the chunks that they come in. Their tokens are kept from block to
        block, up to `KEPT_BYTES`; more images are read again for every coupled block.

        Args:
            images: the few-shot training images without augmentation: (n, 3, H, W), or an iterable that can
                be read again and again (a DataLoader, a list) over batches (b, 3, H, W) or (images, labels)
                pairs.
        """
        chunks: Iterable[Any] = images.split(64) if isinstance(images, (Tensor, Inputs)) else images
        if iter(chunks) is chunks:
            raise ZooError("store_stats reads the images once for every block: pass a tensor, a list or a DataLoader.")
        measured = MeasuredPrompts(self.encoder, chunks)
        with in_eval_mode(self):
            for _ in self.couple(measured):
                pass
        self.stored_stats = torch.stack(measured.stats) if measured.stats else None
        self._drop_measured()  # by other statistics

    def _load_from_state_dict(self, state_dict: Values, prefix: str, *args: Any) -> None:
        """A state with statistics brings them; one with prompts alone leaves none behind."""
        prompts = self.prompts["vision"]
        stats = state_dict.get(f"{prefix}stored_stats")
        if stats is not None and stats.shape == (self.num_coupled, *prompts.shape):  # others are refused by torch
            self.stored_stats = prompts.new_empty(stats.shape)
        elif stats is None and f"{prefix}prompts.text" in state_dict:
            self.stored_stats = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _set_method_classes(self, names: list[str], texts: Texts) -> None:
        """Sentences of the classes follow the prompts in place of `name.`, and a class is the normalised
        mean of their normalised features. Prompts are in place of a template, whichever it is."""
        if isinstance(texts, Mapping):
            after_prompts: Texts = texts
        else:
            after_prompts = self.template
            texts = TEMPLATE
        self.name_tokens = self.encoder.tokenize_names(names, self.config.n_ctx, after_prompts)
        self._set_classes(names, texts)

    has_image_prompts = True

    def _method_linear(self) -> WeightAndBias:
        return self.encoder.scaled(self.encode_text())

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers do not decay: the prompts, as timm treats learned tokens."""
        return {"prompts.text", "prompts.vision"}

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) that newly enter the first vision blocks, in the stored statistics: K + 1
        blocks, or one where they are not rewritten; ZooError without."""
        if not self.has_stats:
            raise ZooError(NO_STATS)
        return self._constants()[0]

    def encode_text(self) -> Tensor:
        """Normalised text features (C, E) of the classes. ZooError if they depend on images: coupling
        bidirectional or vision_to_text without stored statistics."""
        if self.text_reads_images and self.stats != "stored":
            problem = f"With {self.config.coupling} coupling and stats={self.stats} texts depend on the images"
            raise ZooError(f"{problem}: call model.store_stats(images) and use these, or call the model itself.")
        return self._constants()[1]
