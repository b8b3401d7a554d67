"""What timm's functions and scripts call on a model beside `forward`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model import towers

POOL = ("CLIP pools its class token", ("token",))  # for `check_only`


class TimmContract:
    """timm's model contract for `DCP`, whose classifier is the text features of its class names."""

    @property
    def head_hidden_size(self: Any) -> int:
        """E, the width of what `forward_head(pre_logits=True)` returns."""
        return self.num_features

    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each vision block and each chunk of class names in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable

    def forward_features(self: Any, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) -> normalised image features (B, E)."""
        return self.encode_image(images)

    def forward_intermediates(
        self: Any,
        images: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[torch.Tensor, list[Any]] | list[Any]:
        """Patch tokens as the vision blocks leave them, without the prompts.

        Args:
            images: (B, 3, H, W), normalised as `create_transform` does.
            indices: all blocks for None, the last n for n, or a list of their numbers, -1 being the last.
            return_prefix_tokens: pair the patches with the class token (B, 1, Dv).
            norm: apply CLIP's last layer norm to what is returned.
            stop_early: compute no block after the last of `indices`; the image features are then taken from that one.
            output_fmt: "NCHW" for maps (B, Dv, h, w), "NLC" for tokens (B, h * w, Dv).
            intermediates_only: leave out the image features.

        Returns:
            Image features (B, E) as `forward_features` gives them, and a list with one entry per block, in their order.

        Raises:
            ZooError: a block that there is not, or an unknown format.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        blocks = take_blocks(indices, len(self.vision_blocks))
        stop = blocks[-1] if stop_early or intermediates_only else len(self.vision_blocks) - 1
        *intermediates, final = tokens_after(self, images, blocks, stop)
        if norm:
            intermediates = [self.visual.ln_post(x) for x in intermediates]
        patches = [x[:, 1:] for x in intermediates]
        if output_fmt == "NCHW":
            grid = tuple(self.visual.grid_size)
            patches = [x.transpose(1, 2).unflatten(2, grid).contiguous() for x in patches]
        found: list[Any] = patches
        if return_prefix_tokens:
            found = [(x, y[:, :1]) for x, y in zip(patches, intermediates, strict=True)]
        return found if intermediates_only else (towers.image_features(self.visual, final), found)

    @property
    def feature_info(self: Any) -> list[dict[str, Any]]:
        """What timm knows of each vision block's feature map: channels, reduction and module."""
        width, reduction = self.visual.class_embedding.shape[-1], self.visual.patch_size[0]
        names = [f"clip.visual.transformer.resblocks.{i}" for i in range(len(self.vision_blocks))]
        return [{"num_chs": width, "reduction": reduction, "module": name} for name in names]

    def forward_head(self: Any, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features (B, E) of `forward_features` -> logits (B, C), or the features themselves with `pre_logits`.

        Raises:
            ZooError: the text features depend on the images (bidirectional coupling without a calibrated context).
        """
        if pre_logits or self.num_classes == 0:
            return features
        return self.logits(features, self.encode_text())

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
        check_only("global_pool", global_pool, *POOL)
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


def check_only(argument: str, value: Any, reason: str, values: tuple[Any, ...]) -> None:
    """Raise ZooError unless `value` is None or one of `values`, which all say the same."""
    if value not in (None, *values):
        raise ZooError(f"{argument}={value!r}: {reason}, only {values[0]!r} can be honoured.")


def take_blocks(indices: int | Sequence[int] | None, n_blocks: int) -> list[int]:
    """The blocks that timm's `indices` mean, in order: all for None, the last n for n, or by number, -1 being the last.

    Raises:
        ZooError: no blocks, or one that there is not.
    """
    given: Any = range(n_blocks) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
    blocks = sorted({i + n_blocks if i < 0 else i for i in given})
    if not blocks or blocks[0] < 0 or blocks[-1] >= n_blocks:
        raise ZooError(
            f"There are no blocks {indices!r}: the vision tower has blocks 0 to {n_blocks - 1}. Give how many of the "
            "last ones, or a list of their numbers, -1 being the last."
        )
    return blocks


def tokens_after(model: Any, images: torch.Tensor, blocks: Sequence[int], stop: int) -> list[torch.Tensor]:
    """Class token and patches (B, 1 + patches, Dv) as each of `blocks` leaves them, then as block `stop` does."""
    if model.context == "sample" and len(images) > 1:
        runs = [tokens_after(model, image, blocks, stop) for image in images.split(1)]
        return [torch.cat(tokens) for tokens in zip(*runs, strict=True)]
    taken = []
    for step, _, x in model.walk(images):
        x = x[:, : -model.config.n_ctx]
        if step.block in blocks:
            taken.append(x)
        if step.block == stop:
            break
    return [*taken, x]
