"""A frozen open_clip CLIP: features of images, class names and sentences, and zero-shot logits."""

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model import names, towers
from dcp_zoo.model.names import NAME, TEMPLATE, Texts, Tokenizer
from dcp_zoo.model.towers.blocks import call
from dcp_zoo.model.towers.text import Runner, TextTower, prompted_text
from dcp_zoo.model.towers.vision import VisionTower


class FrozenCLIP(nn.Module):
    """Holds a CLIP whose weights never change and which is always in eval mode. It may be any of open_clip's, also one
    into whose towers no prompts can be inserted. `tokenizer` is its open_clip tokenizer, by default open_clip's BPE
    tokenizer, and `pretrained_cfg` timm's, which defines the preprocessing."""

    first_block = 0  # the first vision block that prompts enter

    def __init__(
        self, clip: nn.Module, tokenizer: Tokenizer | None = None, pretrained_cfg: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.clip: Any = clip.requires_grad_(False)
        self.tokenizer = tokenizer or names.default_tokenizer()
        self.clip.eval()
        self.architecture, self.clip_source = "custom", "custom"  # the zoo's names for them
        self.pretrained_cfg = self.default_cfg = pretrained_cfg or {}

    def train(self, mode: bool = True) -> Any:
        """Set training mode; CLIP stays in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self

    @property
    def visual(self) -> Any:
        return self.clip.visual

    @property
    def text(self) -> Any:
        """The module with the text tower: the CLIP itself, or `.text` of open_clip's CustomTextCLIP and CoCa."""
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
    def stem(self) -> VisionTower | None:
        """The image tower if its patch embedding is a network whose output is worth keeping, as the miniature's."""
        tower = self.vision_tower_or_none
        return tower if tower and tower.has_stem else None

    @property
    def vision_blocks(self) -> Any:
        return self.visual.get_submodule(self.vision_tower.block_path)

    @property
    def text_blocks(self) -> Any:
        return self.text.transformer.resblocks

    @property
    def num_features(self) -> int:
        """E, the width of image and text features."""
        projection, width = getattr(self.text, "text_projection", None), getattr(self.text, "output_dim", None)
        if isinstance(projection, nn.Linear):
            return projection.out_features
        return projection.shape[-1] if projection is not None else width or self.text_tower.width

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    def encode_image(self, images: Tensor, patches: bool = False) -> Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps (B, Dv, h, w) -> normalised features (B, E)."""
        return self.encode_prompted(images, (), patches)

    @property
    def is_prompted(self) -> bool:
        """Whether features depend on more than the weights of the image tower."""
        return False

    def encode_prompted(
        self, images: Tensor, prompts: Sequence[Tensor] = (), patches: bool = False, run: Runner = call
    ) -> Tensor:
        """`encode_image` with prompts (M, Dv) beside the image's own tokens, those for each of the first blocks, see
        `entering`; `run` calls each block, such as with gradient checkpointing. Features (B, E) in place of images stay
        as they are. ZooError for prompts in an image tower without transformer blocks, such as a ResNet."""
        if images.ndim == 2:
            return images
        if not prompts and self.vision_tower_or_none is None:
            return F.normalize(self.clip.encode_image(images), dim=-1)
        x, block = self.embed(images, patches)
        return self.vision_tower.features(self.vision_tower.run(x, prompts, block, run=run))

    def embed(self, images: Tensor, patches: bool) -> tuple[Tensor, int]:
        """images or patch maps, see `encode_image` -> tokens x (B, N, Dv), and the block that they enter."""
        return self.vision_tower.embed(images, patches), 0

    def entering(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Learned prompts (M, Dv) as they enter the blocks: the first through `ln_pre`, as all tokens do."""
        return [*map(self.vision_tower.embed_prompts, prompts[:1]), *prompts[1:]] if prompts else []

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Token ids (n, L) of sentences, on the device of the CLIP; ZooError for one longer than the tower reads."""
        sentences, own = list(sentences), hasattr(self.text, "positional_embedding")
        # others have room for far more than their tokenizer fills
        length = self.text.context_length if own else getattr(self.tokenizer, "context_length", None)
        if length is None:  # a tokenizer of the user's
            return self.tokenizer(sentences).to(self.device)
        ids = self.tokenizer(sentences, context_length=4 * length)  # as in `names.tokenize_names`
        names.check_lengths([f"The text {text!r}" for text in sentences], names.last_tokens(ids) + 1, length)
        return ids[:, :length].to(self.device)

    def embed_words(self, phrase: str, n: int) -> Tensor:
        """The embeddings (n, Dt) of a phrase's first tokens."""
        return self.text.token_embedding(self.tokenize([phrase])[0, names.start_tokens(self.tokenizer) :][:n]).float()

    def tokenize_names(self, classnames: Sequence[str], n_ctx: int, texts: Texts = NAME) -> Any:
        """The texts of the classes in chunks, to follow `n_ctx` prompts; ZooError if one does not fit. See `names`."""
        return names.tokenize_names(classnames, self.tokenizer, self.text_tower, n_ctx, texts).to(self.device)

    @torch.no_grad()
    def encode_sentences(self, classnames: Sequence[str], texts: Texts) -> Tensor:
        """Text features (C, E) of a template filled with each name, not normalised; or, with sentences of each class,
        the normalised mean of their normalised features. ZooError as of `tokenize`."""
        sentences, counts = names.class_texts(classnames, texts)
        ids = self.tokenize(sentences)
        features = torch.cat([self.clip.encode_text(chunk, normalize=False) for chunk in ids.split(100)])
        return features if counts is None else names.mean_of_texts(F.normalize(features, dim=-1), counts)

    @torch.no_grad()
    def zero_shot_classifier(self, classnames: Sequence[str], texts: Texts = TEMPLATE) -> Tensor:
        """Normalised text features (C, E) of a template filled with each name; or the mean over sentences of each
        class, as in CuPL (Pratt et al., What does a platypus look like?, ICCV 2023)."""
        with suppress(ZooError):  # of another kind of tower, or a text that is too long, of which `tokenize` says more
            if self.text_tower.shares_prefix:  # no text is padded to the tower's length
                prompts = [self.text.token_embedding.weight[:0]]
                return prompted_text(self.text_tower, self.tokenize_names(classnames, 0, texts), prompts)
        return F.normalize(self.encode_sentences(classnames, texts), dim=-1)

    @torch.inference_mode()
    def zero_shot_logits(self, images: Tensor, classifier: Tensor) -> Tensor:
        """images (B, 3, H, W), classifier (C, E) -> logits (B, C) of CLIP alone, without prompts or a text probe."""
        return FrozenCLIP.logits(self, F.normalize(self.clip.encode_image(images), dim=-1), classifier)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Normalised features (B, E), (C, E) -> exp(logit_scale) * cosine (B, C), plus SigLIP's bias."""
        logits = self.clip.logit_scale.exp() * (image_features @ text_features.T).to(self.clip.logit_scale.dtype)
        return logits if getattr(self.clip, "logit_bias", None) is None else logits + self.clip.logit_bias

    def scaled(self, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` of image features as a linear function: weight (C, E), and SigLIP's bias (C,), else zero."""
        weight = self.clip.logit_scale.exp() * text_features
        bias = weight.new_zeros(len(weight))
        if getattr(self.clip, "logit_bias", None) is not None:
            bias = bias + self.clip.logit_bias
        return weight, bias
