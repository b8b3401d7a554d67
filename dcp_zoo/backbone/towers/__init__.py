"""CLIP's two towers block by block, to insert prompts and rewrite them in between; its modules are not
modified."""

from collections.abc import Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import nn

from dcp_zoo.backbone.tokens import pool_type
from dcp_zoo.backbone.towers.open_clip import OpenClipViT, VisionTower, missing_parts
from dcp_zoo.backbone.towers.text import TextTower
from dcp_zoo.backbone.towers.timm_vit import TimmViT
from dcp_zoo.errors import ZooError, as_zoo_error

FORMATS = ("NCHW", "NLC")  # of intermediates: maps (B, Dv, h, w), tokens (B, h * w, Dv)


def vision_tower(clip: nn.Module) -> VisionTower:
    """The image tower of a CLIP; ZooError, naming what is missing, if prompts cannot be inserted into it."""
    visual: Any = getattr(clip, "visual", None)
    trunk = getattr(visual, "trunk", visual)
    kind: type[OpenClipViT | TimmViT]
    if hasattr(visual, "class_embedding") and hasattr(visual, "transformer"):
        kind = OpenClipViT
    elif trunk is not visual and all(hasattr(trunk, part) for part in ("blocks", "patch_embed", "num_prefix_tokens")):
        kind = TimmViT
    else:
        name = type(trunk).__name__
        raise _refused(clip, f"an image tower of transformer blocks, with or without a class token, not {name}")
    missing = kind.missing(visual)
    if missing:
        raise _refused(clip, missing)
    return kind(visual)


def text_tower(clip: nn.Module) -> TextTower:
    """The text tower of a CLIP; ZooError, naming what is missing, if prompts cannot be inserted into it."""
    text: Any = getattr(clip, "text", clip)  # in open_clip's CustomTextCLIP and CoCa it is a module of its own
    if not hasattr(getattr(text, "transformer", None), "resblocks"):
        raise _refused(clip, f"open_clip's own text transformer, not {type(text).__name__}")
    missing = "pooling at one token" if pool_type(text) == "none" else missing_parts(text.transformer.resblocks)
    if missing:
        raise _refused(clip, missing)
    return TextTower(text)


def _refused(clip: nn.Module, missing: str) -> ZooError:
    return ZooError(
        f"DCP cannot use this CLIP ({type(clip).__name__}): it needs {missing}. "
        "Any open_clip model with a ViT works, such as ViT-B-16, ViT-L-14 or ViT-B-16-SigLIP2. The methods on "
        "features, such as tip-adapter-f and clap, work with every CLIP model."
    )


def take_blocks(indices: int | Sequence[int] | None, n_blocks: int) -> list[int]:
    """timm's `indices` as block numbers in order, as in `Head.forward_intermediates`; ZooError for a wrong
    one."""
    with as_zoo_error(f"Unknown blocks {indices}: {{}}.", AssertionError):
        taken, _ = feature_take_indices(n_blocks, indices)  # type: ignore[arg-type]  # any sequence will do
    return sorted(set(taken))
