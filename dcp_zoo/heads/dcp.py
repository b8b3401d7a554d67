"""DCP: a frozen CLIP whose prompts rewrite each other between blocks (DCP, ACL Findings 2023, arXiv 2305.17903), by
Cross-Modal Prompt Attention (CMPA), the small trained module between its towers.

Shapes: B images, C classes, M prompt tokens, K coupled blocks, widths Dv (vision) and Dt (text), E embedding.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from timm.layers import LayerNormFp32  # computes in float32 and returns the input's dtype
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone._torch import WeightCache, in_eval_mode, pool, pool_stream
from dcp_zoo.backbone.classes import NAME, TEMPLATE, Texts, check_classnames
from dcp_zoo.backbone.clip import FrozenCLIP, Reading, joined, parts_of
from dcp_zoo.backbone.inputs import Images, Inputs
from dcp_zoo.backbone.tokens import Tokenizer
from dcp_zoo.backbone.towers.open_clip import EMBEDDING, append_prompts
from dcp_zoo.backbone.towers.text import FullRun, PrefixRun, TextChunks
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import STATS, Abilities, DCPConfig, HeadConfig, own_names
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head import Head

HEAD_WIDTH = 64  # of the attention heads in both CLIP towers, and therefore in CMPA


class PromptAttention(nn.Module):
    """Rewrites the prompts of one tower, whose width is a multiple of 64, from those of the other, the queries."""

    def __init__(self, dim: int, other_dim: int) -> None:
        super().__init__()
        if dim % HEAD_WIDTH:
            raise ZooError(f"CMPA needs tower widths that are multiples of {HEAD_WIDTH}, but this CLIP has {dim}.")
        self.query = nn.Linear(other_dim, dim)
        self.norm1 = LayerNormFp32(dim, eps=1e-5)
        self.attn = nn.MultiheadAttention(dim, dim // HEAD_WIDTH, batch_first=True)
        self.norm2 = LayerNormFp32(dim, eps=1e-5)
        c_fc, c_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        """own (M, D), other (M, other_dim) -> the new prompts (M, D)."""
        query, key = self.norm1(self.query(other)), self.norm1(own)  # the same norm for both
        x = own + self.attn(query, key, key, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class CMPA(nn.Module):
    """Both directions of prompt attention, or only text to vision: without `to_text`, which would never be trained."""

    def __init__(self, vision_width: int, text_width: int, bidirectional: bool) -> None:
        super().__init__()
        self.to_vision = PromptAttention(vision_width, text_width)
        self.to_text = PromptAttention(text_width, vision_width) if bidirectional else None

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled vision prompts v (M, Dv) and text prompts t (M, Dt) -> both rewritten."""
        return self.to_vision(v, t), t if self.to_text is None else self.to_text(t, v)


class DCP(Head):
    """A CLIP classifier with deeply coupled prompts. Only the prompts and CMPA require gradients. ZooError for an
    unsupported CLIP, an unknown option or choice, or class names that are empty or too long.

    Args:
        clip: an open_clip CLIP with a vision transformer, taken as it is, or a `FrozenCLIP`; widths and depths are read
            from it.
        classnames: one name per class; underscores are read as spaces.
        config: the options; or give them one by one, as `n_ctx=4, depth=3`. See `DCPConfig`.
        tokenizer: open_clip tokenizer of `clip`. Default: open_clip's own BPE tokenizer.
        texts: sentences of each class, see `set_classnames`.
    """

    kind = "dcp"
    trained = ("prompts.", "cmpa.", "stored_stats")
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
        self.method, self.abilities = "dcp", Abilities(coupled=True)
        self.config = config = DCPConfig.from_options((config.as_dict() if config else {}) | options)
        vision, text = self.encoder.vision_tower, self.encoder.text_tower
        dv, dt = vision.width, text.width
        room = text.length - 4  # start, a name's token, full stop, end
        if config.n_ctx > room:
            raise ZooError(f"n_ctx must be at most {room} for this CLIP, not {config.n_ctx}: no class name would fit.")
        initial = {name: 0.02 * torch.randn(config.n_ctx, width) for name, width in (("text", dt), ("vision", dv))}
        self.template = NAME  # follows the text prompts
        if config.ctx_init and config.n_ctx <= 4:
            initial["text"] = self.encoder.embed_words(config.ctx_init, config.n_ctx)
            self.template = " ".join([*config.ctx_init.split()[config.n_ctx :], NAME])
        self.prompts = nn.ParameterDict(initial).to(self.device)
        self.num_coupled = min(config.depth, len(vision.blocks) - 1, len(text.blocks) - 1)  # K
        bidirectional = config.coupling == "bidirectional"
        modules = 1 if config.share_cmpa else self.num_coupled
        self.cmpa = nn.ModuleList(CMPA(dv, dt, bidirectional) for _ in range(modules)).to(self.device)
        self.stored_stats: Tensor | None  # (K, M, Dv), see `store_stats`
        self.register_buffer("stored_stats", None)
        self._cache = WeightCache()
        self._classify_into(check_classnames(classnames), texts)
        self.stats = None

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "DCP":
        """The head of a checkpoint, by its `config.json`, which `load_head` then loads."""
        options = DCPConfig.from_options(config["model_args"])
        return cls(clip, own_names(config), options, texts=config["dcp"]["texts"])

    def forward(self, images: Images) -> Tensor:
        """Images (B, 3, H, W), normalised as `create_transform` does, or other `Inputs` -> logits (B, C), without
        classes features."""
        if self.num_classes == 0 or self.fc is not None or self.stats == "stored":
            return super().forward(images)
        features, text = self.encode(images)
        if self.text_probe is None:
            return self.encoder.logits(features, text)
        reads = self.reads
        plain, *others = (reading.encode(images) for reading in reads[1:])
        weight, bias = self.zero_shot_linear()
        with torch.autocast(features.device.type, enabled=False):
            zero_shot = F.linear(plain[:, : features.shape[1]].to(weight.dtype), weight, bias)
        f = joined([features, plain, *others], parts_of(reads))
        return self.text_probe((self.encoder.logits(features, text) + zero_shot) / 2, f, self.classes)

    def encode(self, images: Images) -> tuple[Tensor, Tensor]:
        """Images, one batch -> normalised features of the images (B, E) and of the classes (C, E)."""
        image_features, text_features = self._encode(images)
        return image_features, text_features()

    def couplings(
        self, stats: Callable[[int], Tensor], names: TextChunks | None = None
    ) -> Iterator[tuple[Tensor | None, PrefixRun | FullRun]]:
        """The loop of the method: runs the text prompts through their tower and rewrites the prompts of both towers.
        With v = stats(i), the pooled vision prompts (M, Dv), and t, the text prompts (M, Dt) pooled over the classes,
        before block i = 1 .. K:

            v', t' = CMPA.to_vision(v, t), CMPA.to_text(t, v)

        In a causal text tower t is the same for every class, as the prompts precede the names. Of each block: the
        vision prompts (M, Dv) that newly enter it, None behind block K, and the text tower after its block.
        """
        vision, text_tower, prompts = self.encoder.vision_tower, self.encoder.text_tower, self.prompts
        text = text_tower.begin(prompts["text"], names or self.name_tokens, self._checkpointed)
        for i in range(max(len(vision.blocks), len(text_tower.blocks))):
            v = vision.embed_prompts(prompts["vision"]) if i == 0 else None
            if 1 <= i <= self.num_coupled:
                cmpa = self.cmpa[0 if self.config.share_cmpa else i - 1]
                v, t = stats(i).to(prompts["vision"].dtype), text.prompts(self.config.pooling).to(prompts["text"].dtype)
                v, t = cmpa(v, t)
                if self.config.coupling == "bidirectional":
                    text.replace(t)
            if i < len(text_tower.blocks):
                text.step()
            yield v, text

    def _walk(self, images: Images, last: bool = False) -> Iterator[tuple[Tensor, Tensor, PrefixRun | FullRun]]:
        """Both towers side by side on one batch: the tokens (B, N + M, Dv) that enter and leave each vision block, the
        prompts last, and the text tower. With `last`, only the pooled tokens leave the last block."""
        tower, x = self.encoder.vision_tower, self.encoder.enter(images).x
        n, stored = x.shape[1], self.stored_stats if self.stats == "stored" else None

        def stats(i: int) -> Tensor:
            return pool(x[:, n:], self.config.pooling) if stored is None else stored[i - 1]

        for i, (v, text) in enumerate(self.couplings(stats)):
            if v is not None:
                x = append_prompts(x[:, :n], v)
            entering = x
            if i < len(tower.blocks):
                x = self._checkpointed(tower.block, i, x, None, last and i == len(tower.blocks) - 1)
            yield entering, x, text

    def _encode(self, images: Images) -> tuple[Tensor, Callable[[], Tensor]]:
        """Image features (B, E), and what computes text features (C, E): class names run last, if they are needed."""
        if self.stats == "stored":  # the text is known: the towers need not run side by side
            prompts, text_features = self._constants()
            return self.encoder.encode_image(images, prompts, self._checkpointed), lambda: text_features
        ((_, x, text),) = deque(self._walk(images, last=True), 1)
        return self.encoder.vision_tower.features(x), text.features

    @torch.compiler.disable  # reads texts, and is kept
    def _constants(self) -> tuple[list[Tensor], Tensor]:
        """Copies of what depends on no image in the stored statistics: the prompts (M, Dv) that enter K + 1 vision
        blocks, and the text features (C, E); computed again when a weight changes, see `WeightCache`."""
        prompts, text_features = self._cache(self._run_text, [*self.parameters(), *self.buffers()], self.name_tokens)
        return [p.clone() for p in prompts], text_features.clone()

    def _run_text(self, names: TextChunks | None = None) -> tuple[list[Tensor], Tensor]:
        stored = self.stored_stats  # None only with text_to_vision, whose text ignores the vision prompts
        steps = list(self.couplings(lambda i: self.prompts["vision"] if stored is None else stored[i - 1], names))
        return [v for v, _ in steps if v is not None], steps[-1][1].features()

    @property
    def stats_modes(self) -> tuple[str, ...]:
        return ("batch",) if self.stored_stats is None else ("stored", "batch")

    @property
    def stats(self) -> str:
        """What CMPA reads of the images. As in BatchNorm, training pools over the batch, on whose other images an
        image's logits then depend ("batch"); evaluation takes what `store_stats` stored ("stored", the default)."""
        return "batch" if self.training or self.stored_stats is None or self._stats == "batch" else "stored"

    @stats.setter
    def stats(self, stats: str | None) -> None:
        if stats is not None:
            check_choice("stats", stats, STATS)
        if stats == "stored" and self.stored_stats is None:
            raise ZooError('stats="stored" needs stored statistics: call model.store_stats(images) first.')
        self._stats = stats

    @torch.no_grad()
    def store_stats(self, images: Images | Iterable[Any]) -> None:
        """Measure and store the statistics, so that logits depend on no batch. ZooError for no images or an iterator.

        All images count as one batch. They are read once for every coupled block, in the chunks that they come in.

        Args:
            images: the few-shot training images without augmentation: (n, 3, H, W), or an iterable that can be read
                again and again (a DataLoader, a list) over batches (b, 3, H, W) or (images, labels) pairs.
        """
        chunks: Iterable[Any] = images.split(64) if isinstance(images, (Tensor, Inputs)) else images
        if iter(chunks) is chunks:
            raise ZooError("store_stats reads the images once for every block: pass a tensor, a list or a DataLoader.")
        prompts: list[Tensor] = []  # that enter vision blocks 0, 1, ...
        pooled: list[Tensor] = []

        def leaving() -> Iterator[Tensor]:
            """The prompts (b, M, Dv) of each chunk that leave the last block with known prompts."""
            for chunk in chunks:
                images = chunk[0] if isinstance(chunk, (tuple, list)) else chunk
                x = self.encoder.enter(images.to(self.device)).x
                yield self.encoder.vision_tower.run(x, prompts, 0, len(prompts))[:, x.shape[1] :].float()

        def measure(i: int) -> Tensor:
            pooled.append(pool_stream(leaving(), self.config.pooling))
            return pooled[-1]

        with in_eval_mode(self):
            for v, _ in self.couplings(measure):
                if v is not None:
                    prompts.append(v)
        self.stored_stats = torch.stack(pooled) if pooled else None

    def _load_from_state_dict(self, state_dict: Values, prefix: str, *args: Any) -> None:
        """A state with statistics brings them; one with prompts alone leaves none behind."""
        given, v = state_dict.get(f"{prefix}stored_stats"), self.prompts["vision"]
        if given is not None and self.stored_stats is None:
            self.stored_stats = v.new_full((self.num_coupled, *v.shape), torch.nan)  # stays where `given` does not fit
        elif given is None and f"{prefix}prompts.text" in state_dict:
            self.stored_stats = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _classify_into(self, names: list[str], texts: Texts | None) -> None:
        """Sentences of the classes follow the prompts in place of `name.`, and a class is the normalised mean of their
        normalised features. A template changes nothing, as prompts are in its place; {} takes the sentences away."""
        now = texts or TEMPLATE if isinstance(texts, Mapping) else self.texts
        self.name_tokens = self._tokens(names, now)
        self._keep(names, now)

    def _tokens(self, names: Sequence[str], texts: Texts) -> TextChunks:
        """What follows the text prompts of each class."""
        behind = texts if isinstance(texts, Mapping) else self.template
        return self.encoder.tokenize_names(names, self.config.n_ctx, behind)

    def _own_reading(self) -> Reading:
        clip = self.encoder
        return Reading(
            clip,
            parts={EMBEDDING: clip.num_features},
            encode=lambda images: self._encode(images)[0],
            start=lambda: clip.scaled(self.encode_text()),
            prompts=self.image_prompts,
        )

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) that enter the first K + 1 vision blocks, in the stored statistics."""
        return self._constants()[0]

    def encode_text(self, classnames: Sequence[str] | None = None) -> Tensor:
        """Normalised text features (C, E) of `classnames`, default the model's own. ZooError if they depend on images:
        bidirectional coupling without stored statistics."""
        if self.config.coupling == "bidirectional" and self.stats != "stored":
            problem = f'With bidirectional coupling and stats="{self.stats}" the text features depend on the images'
            raise ZooError(f"{problem}: call model.store_stats(images) and use these, or call the model itself.")
        if classnames is None:
            return self._constants()[1]
        return self._run_text(self._tokens(check_classnames(classnames), self.texts))[1]

    def method_config(self) -> tuple[Values, Values]:
        return self.config.as_dict(), {"head": self.kind}

    def expected_state(self, shapes: Mapping[str, Tensor], config: HeadConfig | None = None) -> dict[str, Tensor]:
        """With or without stored statistics, as the file has them."""
        state, vision = super().expected_state(shapes, config), self.prompts["vision"]
        state.pop("stored_stats", None)
        stats = {"stored_stats": vision.new_empty(self.num_coupled, *vision.shape)} if "stored_stats" in shapes else {}
        return state | stats

    def fuse(self) -> FusedHead:
        chosen, self.stats = self._stats, "stored"
        try:
            return super().fuse()
        finally:
            self.stats = chosen

    def _apply(self, *args: Any, **kwargs: Any) -> "DCP":  # .to(), .half(): tensors change without a new version
        self._cache = WeightCache()
        return super()._apply(*args, **kwargs)
