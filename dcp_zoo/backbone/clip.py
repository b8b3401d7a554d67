"""The encoders of heads, and what a classifier reads of them.

The encoder of every head is a frozen open_clip CLIP: its image tower gives features of images, its text
tower those of class names and sentences, and zero-shot logits are their scaled cosines. Encoders of images
alone may stand beside it.

A `Reading` is a source of features: an encoder, and the kinds of its features (`parts`) that a classifier
uses. The features f_1, .., f_P of all readings of a head, each of the length 1, are joined to f = [f_1, ..,
f_P] / sqrt(P).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone import tokens, towers
from dcp_zoo.backbone._torch import WeightCache, construction, fingerprint
from dcp_zoo.backbone.classes import NAME, TEMPLATE, Texts, class_texts, mean_of_texts
from dcp_zoo.backbone.inputs import Features, Images, Tokens, as_inputs
from dcp_zoo.backbone.preprocessing import PREPROCESSING
from dcp_zoo.backbone.tokens import Tokenizer
from dcp_zoo.backbone.towers.open_clip import EMBEDDING, JOINED, VisionTower
from dcp_zoo.backbone.towers.text import TextChunks, TextTower, prompted_text
from dcp_zoo.errors import ZooError, warn
from dcp_zoo.fields import Values

Self = TypeVar("Self", bound="Frozen")
WeightAndBias = tuple[Tensor, Tensor]  # weight (C, E) and bias (C,) of logits
TOO_LONG = 4  # times a text tower's length: texts are tokenized so far, to detect long ones instead of cutting them


class Frozen(nn.Module):
    """The base of both kinds of encoders: a model whose weights never change, and which is always in eval
    mode."""

    source: str  # where the weights are from: open_clip's tag, or timm's name
    pretrained_cfg: Values  # timm's
    parts: dict[str, int]  # the kinds of features that `read` gives, in order, and their widths

    def __init__(self) -> None:
        super().__init__()
        self._fingerprint = ""
        self._identity = WeightCache()

    def train(self: Self, mode: bool = True) -> Self:
        """It stays in eval mode."""
        return super().train(False)

    def remember_weights(self: Self, fingerprint: str = "") -> Self:
        """Keep the `fingerprint` of the weights as they are now, for when they are cast to another
        precision; or a given one, for an encoder without its weights."""
        self._fingerprint = fingerprint or self.fingerprint()
        return self

    def fingerprint(self) -> str:
        """Of all weights as they were loaded, in float32; "" if they are in half precision and were not
        remembered."""
        if self._fingerprint:
            return self._fingerprint
        state = {}
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point():
                if tensor.element_size() < 4:
                    return ""
                tensor = tensor.float()
            state[name.partition(".")[2]] = tensor  # by its name in the model
        return fingerprint(state)

    def check_weights(self, trained_on: str | None, head: object) -> None:
        """ZooError unless these are the weights that a head was trained on, by their fingerprints; a warning
        where one is unknown."""
        own = self.fingerprint()
        if not trained_on or not own:
            problem = f"Whether the {self.source!r} weights are those that the head in {head} was trained on is unknown"
            warn(f"{problem}: they were not loaded in float32, here or there.")
        elif trained_on != own:
            raise ZooError(
                f"The head in {head} was trained on other weights: theirs have the fingerprint {trained_on}, and the "
                f"{self.source!r} weights here have {own}. Load the same revision or file (a damaged download: hf "
                "cache rm), or train the head again."
            )

    def identity(self) -> str:
        """Of the image tower as it is now: two towers with the same one give the same features of the same
        pixels."""
        tower = self.visual
        tensors = dict(tower.named_parameters()) | dict(tower.named_buffers())
        first = [t[(0,) * t.ndim].float() for t in tensors.values() if t.numel()]  # change where torch counts no write
        samples = torch.stack(first).tolist()  # one wait for the device
        weights = self._identity(lambda: fingerprint(tensors), tensors.values(), samples)
        return f"{weights} {construction(tower)}"

    @property
    def preprocessing(self) -> str:
        """How images are prepared for the image tower, as one text."""
        return str([self.pretrained_cfg.get(name) for name in PREPROCESSING])

    @property
    def visual(self) -> Any:
        """The module that features of images come from."""
        return self


class FrozenCLIP(Frozen):
    """A CLIP whose weights never change and which is always in eval mode. It may be any of open_clip's, also
    one into whose towers no prompts can be inserted.

    Args:
        clip: the open_clip model; its parameters require no gradients from now on.
        tokenizer: its open_clip tokenizer. Default: open_clip's BPE tokenizer.
        pretrained_cfg: timm's, which defines the preprocessing.
        architecture, source: the zoo's names for the model, and for the weights.
    """

    note = ""  # what is uncertain about the weights

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Tokenizer | None = None,
        pretrained_cfg: Values | None = None,
        architecture: str = "custom",
        source: str = "custom",
    ) -> None:
        super().__init__()
        self.clip: Any = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer or tokens.default_tokenizer()
        self.architecture = architecture
        self.source = source
        self.pretrained_cfg = {} if pretrained_cfg is None else pretrained_cfg

    def prepared_as(self, changes: Values) -> "FrozenCLIP":
        """This CLIP, reading images with these changes of its preprocessing: a shallow copy, as other heads may
        share it."""
        if changes.items() <= self.pretrained_cfg.items():
            return self
        changed = copy(self)
        changed.pretrained_cfg = self.pretrained_cfg | changes
        return changed

    def with_clip(self, clip: nn.Module) -> "FrozenCLIP":
        """Another CLIP of the same kind, such as a copy that a method trains."""
        return FrozenCLIP(clip, self.tokenizer, self.pretrained_cfg, self.architecture, self.source)

    @property
    def visual(self) -> Any:
        return self.clip.visual

    @property
    def text(self) -> Any:
        """The module with the text tower: the CLIP itself, or `.text` of open_clip's CustomTextCLIP and
        CoCa."""
        return getattr(self.clip, "text", self.clip)

    @cached_property
    def vision_tower(self) -> VisionTower:
        """The image tower block by block; ZooError if it has no transformer blocks, as a ResNet."""
        return towers.vision_tower(self.clip)

    @cached_property
    def text_tower(self) -> TextTower:
        """The text tower block by block; ZooError unless it is open_clip's own."""
        return towers.text_tower(self.clip)

    @cached_property
    def vision_tower_or_none(self) -> VisionTower | None:
        with suppress(ZooError):
            return self.vision_tower
        return None

    @property
    def num_features(self) -> int:
        """E, the width of image and text features."""
        projection = getattr(self.text, "text_projection", None)
        if isinstance(projection, nn.Linear):
            return projection.out_features
        if projection is not None:
            return projection.shape[-1]
        return getattr(self.text, "output_dim", None) or self.text_tower.width

    @cached_property
    def parts(self) -> dict[str, int]:  # type: ignore[override]
        """The embedding, and the image tower's `extra` features."""
        tower = self.vision_tower_or_none
        return {EMBEDDING: self.num_features} | (tower.extra if tower else {})

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    # --- images ---

    def encode_image(self, images: Images, prompts: Sequence[Tensor] = ()) -> Tensor:
        """Images, in any form -> normalised features (B, E). ZooError for prompts in an image tower without
        blocks.

        Args:
            images: pixels (B, 3, H, W), normalised as `create_transform` does, or other `Inputs`.
            prompts: (M, Dv) for each of the first blocks, as they enter it beside the image's tokens, see
                `embed_prompts`.
        """
        if not prompts:
            return self.read(images, 1)[:, : self.num_features]
        return self.vision_tower.features(self.vision_tower.run(self.enter(images).x, prompts))

    def read(self, images: Images, parts: int | None = None) -> Tensor:
        """Images, in any form -> the first `parts` kinds of features, by default all, each normalised (B,
        ..). Given `Features` stay as they are."""
        inputs = as_inputs(images)
        if isinstance(inputs, Features):
            return inputs.x
        if self.vision_tower_or_none is None:
            return F.normalize(self.clip.encode_image(inputs.x), dim=-1)
        return self.vision_tower.read(self.enter(inputs), (), parts)

    def enter(self, images: Images) -> Tokens:
        """Images -> the tokens (B, N, Dv) that enter the first block; given tokens stay as they are."""
        inputs = as_inputs(images)
        tower = self.vision_tower
        return inputs.to(tower.dtype) if isinstance(inputs, Tokens) else tower.embed(inputs.x)

    def embed_prompts(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Learned prompts (M, Dv) as they enter the blocks: the first through `ln_pre`, as all tokens do."""
        if not prompts:
            return []
        return [self.vision_tower.embed_prompts(prompts[0]), *prompts[1:]]

    # --- texts ---

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Token ids (n, L) of sentences, on the device of the CLIP; ZooError for one longer than the tower
        reads."""
        sentences = list(sentences)
        if hasattr(self.text, "positional_embedding"):
            length = self.text.context_length
        else:  # other text towers read far more than their tokenizer fills
            length = getattr(self.tokenizer, "context_length", None)
        if length is None:  # a tokenizer of the user's
            return self.tokenizer(sentences).to(self.device)
        ids = self.tokenizer(sentences, context_length=TOO_LONG * length)
        tokens.check_lengths(sentences, tokens.last_tokens(ids) + 1, length)
        return ids[:, :length].to(self.device)

    def embed_words(self, phrase: str, n: int) -> Tensor:
        """The embeddings (n, Dt) of a phrase's first tokens."""
        ids = self.tokenize([phrase])[0, tokens.start_tokens(self.tokenizer) :]
        return self.text.token_embedding(ids[:n]).float()

    def tokenize_names(self, names: Sequence[str], n_ctx: int, texts: Texts = NAME) -> TextChunks:
        """The texts of the classes in chunks, to follow `n_ctx` prompts; ZooError if one does not fit."""
        sentences, counts = class_texts(names, texts)
        tower = self.text_tower
        ids = self.tokenizer(sentences, context_length=TOO_LONG * tower.length)
        start = 1 if tower.shares_prefix else tokens.start_tokens(self.tokenizer)
        chunks = tower.chunks(sentences, ids, n_ctx, start)
        chunks.start_id = int(ids[0, 0])
        chunks.counts = counts
        return chunks.to(self.device)

    @torch.no_grad()
    def encode_sentences(self, names: Sequence[str], texts: Texts) -> Tensor:
        """Text features (C, E) of a template filled with each name, not normalised; or, with sentences of
        each class, the normalised mean of their normalised features. ZooError as of `tokenize`."""
        sentences, counts = class_texts(names, texts)
        ids = self.tokenize(sentences)
        features = torch.cat([self.clip.encode_text(chunk, normalize=False) for chunk in ids.split(100)])
        return features if counts is None else mean_of_texts(F.normalize(features, dim=-1), counts)

    @torch.no_grad()
    def zero_shot_classifier(self, names: Sequence[str], texts: Texts = TEMPLATE) -> Tensor:
        """Normalised text features (C, E) of a template filled with each name; or the mean over sentences of
        each class, as in CuPL (Pratt et al., What does a platypus look like?, ICCV 2023)."""
        with suppress(ZooError):  # of another kind of tower, or a text that is too long, of which `tokenize` says more
            if self.text_tower.shares_prefix:  # no text is padded to the tower's length
                prompts = [self.text.token_embedding.weight[:0]]
                return prompted_text(self.text_tower, self.tokenize_names(names, 0, texts), prompts)
        return F.normalize(self.encode_sentences(names, texts), dim=-1)

    # --- logits ---

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Normalised features (B, E), (C, E) -> exp(logit_scale) * cosine (B, C), plus SigLIP's bias,
        in the precision of that scale."""
        scale = self.clip.logit_scale.exp()
        with torch.autocast(scale.device.type, enabled=False):
            logits = scale * (image_features.to(scale.dtype) @ text_features.to(scale.dtype).T)
        bias = getattr(self.clip, "logit_bias", None)
        return logits if bias is None else logits + bias

    def scaled(self, text_features: Tensor) -> WeightAndBias:
        """`logits` of image features as a linear function: weight (C, E), and SigLIP's bias (C,), else
        zero."""
        weight = self.clip.logit_scale.exp() * text_features
        zero = weight.new_zeros(len(weight))
        bias = getattr(self.clip, "logit_bias", None)
        return weight, zero if bias is None else zero + bias


class ImageEncoder(Frozen):
    """A frozen model of timm beside CLIP, which knows what things look like and no words: images, normalised
    as CLIP's `create_transform` does -> normalised features (B, E), timm's before its classifier. It reads
    the same pixels as CLIP, in its own mean and deviation, so that one tensor enters the model wherever it
    runs.

    Args:
        model: of timm, without a classifier; its parameters require no gradients from now on.
        name: timm's, such as "vit_small_patch14_dinov2.lvd142m".
        size: pixels (H, W) that the model reads: CLIP's, or a little less where its patches do not fit them.
        clip: whose normalisation the images have.
    """

    scale: Tensor  # (3, 1, 1), and
    shift: Tensor  # (3, 1, 1), from CLIP's normalisation to the model's

    def __init__(self, model: Any, name: str, size: tuple[int, int], clip: FrozenCLIP) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.source = name
        self.size = size
        self.parts = {EMBEDDING: getattr(model, "head_hidden_size", model.num_features)}  # before a classifier
        self.read_as(clip.pretrained_cfg)

    def read_as(self, cfg: Values) -> None:
        """Read images that are normalised as `cfg` says, CLIP's."""
        self.pretrained_cfg = cfg
        own = self.model.pretrained_cfg
        mean, std, own_mean, own_std = torch.tensor(
            [cfg["mean"], cfg["std"], own["mean"], own["std"]],
            device=next(self.model.parameters()).device,
        )[:, :, None, None]
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def read(self, images: Images) -> Tensor:
        """Pixels (B, 3, H, W) -> features (B, E)."""
        return self(as_inputs(images).x)

    def forward(self, images: Tensor) -> Tensor:
        x = (images * self.scale + self.shift).to(next(self.model.parameters()).dtype)
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        return F.normalize(self.model(x), dim=-1)


Encoder = FrozenCLIP | ImageEncoder


@dataclass(frozen=True)
class Reading:
    """A source of features: one encoder, the parts that are read of it in one pass, and, where it has texts,
    the logits at which the training of a classifier of them starts."""

    encoder: Encoder  # whose weights a method may have changed
    parts: Mapping[str, int]  # what is read, and how wide it is
    encode: Callable[[Images], Tensor]  # images, in any form -> the parts (B, ..), each normalised
    linear: Callable[[], WeightAndBias] | None = (
        None  # logits by the first part: weight (C, E), bias (C,); None without text
    )
    prompts: Callable[[], list[Tensor]] | None = None  # (M, Dv), that enter its blocks; None if there are none

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.parts.values())

    @property
    def inside(self) -> int:
        """How many of its parts, the last ones, are intermediate features of an image tower."""
        return count_inside(self.parts)

    def only(self, parts: int = 1) -> "Reading":
        """The same with its first parts alone."""
        if len(self.parts) <= parts:
            return self
        kept = dict(islice(self.parts.items(), parts))
        return replace(self, parts=kept, encode=lambda images: self.encode(images)[:, : sum(kept.values())])


def count_inside(parts: Mapping[str, int]) -> int:
    """How many kinds of features, the last ones, are intermediate ones of an image tower."""
    return len(parts.keys() - JOINED)


def parts_of(readings: Sequence[Reading]) -> int:
    """P, the number of parts of all readings."""
    return sum(len(reading.parts) for reading in readings)


def joined(features: Sequence[Tensor], parts: int) -> Tensor:
    """Features of some readings, with P parts in all -> f = [f_1, .., f_P] / sqrt(P), which has the length
    1."""
    return torch.cat(list(features), -1) / math.sqrt(parts) if parts > 1 else features[0]


def linear_of(readings: Sequence[Reading]) -> WeightAndBias:
    """The mean of the zero-shot logits (`Reading.linear`) of readings as one linear function of f, see
    `joined`: weight (C, F) and bias (C,). The weight is zero for all but the first part of a reading, and
    for readings without texts."""
    linears = [reading.linear() if reading.linear else None for reading in readings]
    biases = [linear[1] for linear in linears if linear]
    scale = math.sqrt(parts_of(readings)) / len(biases)
    blocks = []
    for reading, linear in zip(readings, linears, strict=True):
        weight = scale * linear[0] if linear else biases[0].new_zeros(len(biases[0]), 0)
        blocks.append(F.pad(weight, (0, sum(reading.widths) - weight.shape[1])))
    return torch.cat(blocks, 1), torch.stack(biases).mean(0)
