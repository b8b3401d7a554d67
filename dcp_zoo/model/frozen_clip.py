"""The base class of all models on a frozen open_clip CLIP."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dcp_zoo.model import towers
from dcp_zoo.model.names import default_tokenizer, tokenize_names


class FrozenCLIP(nn.Module):
    """Holds a CLIP whose weights never change and which is always in eval mode.

    Args:
        clip: an open_clip CLIP with a class-token ViT, used without changes.
        tokenizer: its open_clip tokenizer. Default: open_clip's BPE tokenizer.

    Raises:
        ZooError: an unsupported CLIP.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        towers.check_supported(clip)
        self.clip: Any = clip.requires_grad_(False)
        self.tokenizer = tokenizer or default_tokenizer()
        self.clip.eval()
        # for checkpoints and timm; overwritten by the factory
        self.architecture, self.clip_source = "custom", "custom"
        self.info: dict[str, Any] = {}
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg: dict[str, Any] = {}

    @property
    def visual(self) -> Any:
        return self.clip.visual

    @property
    def text(self) -> Any:
        return towers.text_modules(self.clip)

    @property
    def vision_blocks(self) -> Any:
        return self.visual.transformer.resblocks

    @property
    def text_blocks(self) -> Any:
        return self.text.transformer.resblocks

    @property
    def num_features(self) -> int:
        """E, the width of image and text features."""
        return self.visual.output_dim

    @property
    def device(self) -> torch.device:
        return self.visual.class_embedding.device

    def tokenize_names(self, classnames: Sequence[str], n_ctx: int) -> Any:
        """Class names in chunks, to follow `n_ctx` prompts; ZooError if a name does not fit. See `names`."""
        return tokenize_names(classnames, self.tokenizer, self.text, n_ctx).to(self.device)

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """image_features (B, E), text_features (C, E), normalised -> exp(logit_scale) * cosine (B, C)."""
        return towers.cosine_logits(self.clip, image_features, text_features)

    def train(self, mode: bool = True) -> Any:
        """Set training mode; CLIP stays in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self
