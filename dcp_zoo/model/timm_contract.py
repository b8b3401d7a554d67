"""What timm's functions and scripts call on a model beside `forward`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dcp_zoo.errors import ZooError


class TimmContract:
    """timm's model contract for `DCP`, whose classifier is the text features of its class names."""

    @property
    def head_hidden_size(self: Any) -> int:
        """E, the width of what `forward_head(pre_logits=True)` returns."""
        return self.num_features

    def forward_features(self: Any, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) -> normalised image features (B, E)."""
        return self.encode_image(images)

    def forward_head(self: Any, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features (B, E) of `forward_features` -> logits (B, C), or the features themselves with `pre_logits`.

        Raises:
            ZooError: the text features depend on the images (bidirectional coupling without a calibrated context).
        """
        if pre_logits or self.num_classes == 0:
            return features
        return self.logits(features, self.encode_text()[None])

    @torch.no_grad()
    def get_classifier(self: Any) -> nn.Module:
        """The classifier as it is now: a linear layer of the scaled text features (C, E), or nothing without classes.

        Raises:
            ZooError: as `forward_head`.
        """
        if self.num_classes == 0:
            return nn.Identity()
        text_features = self.encode_text()
        has_bias = self.clip.logit_bias is not None
        classifier = nn.Linear(self.num_features, self.num_classes, bias=has_bias, device=text_features.device)
        classifier.weight.copy_(self.clip.logit_scale.exp() * text_features)
        if classifier.bias is not None:
            classifier.bias.fill_(self.clip.logit_bias)
        return classifier

    def reset_classifier(
        self: Any, num_classes: int, global_pool: str | None = None, classnames: Sequence[str] | None = None
    ) -> None:
        """Classify into other classes, or into none: with `num_classes=0` the model returns image features.

        Args:
            num_classes: 0, or the number of `classnames`.
            global_pool: None or "token".
            classnames: the new classes. Default: the present ones.

        Raises:
            ZooError: a number of classes without as many names, or another pooling.
        """
        check_pool(global_pool)
        if num_classes == 0:
            self.classnames, self.num_classes = list[str](), 0
            return
        names = self.classnames if classnames is None else list(classnames)
        if len(names) != num_classes:
            raise ZooError(
                f"num_classes={num_classes}, and there are {len(names)} class names. A DCP classifies by names: give "
                f"classnames=[...] with {num_classes} of them (model.set_classnames does the same)."
            )
        self.set_classnames(names)

    def group_matcher(self: Any, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for timm's layer-wise learning rates: the prompts and the frozen CLIP, then each CMPA."""
        return {"stem": r"^(?:prompts|clip)\.", "blocks": [(r"^cmpa\.(\d+)", None)]}

    def no_weight_decay(self: Any) -> set[str]:
        """Parameters that timm's optimizers do not decay: the prompts, as timm treats learned tokens."""
        return {"prompts.text", "prompts.vision"}


def check_pool(global_pool: str | None) -> None:
    """Raise ZooError unless the class token is what is asked for."""
    if global_pool not in (None, "token"):
        raise ZooError(f"global_pool={global_pool!r}: CLIP pools its class token, only 'token' can be honoured.")
