"""CLIP's two towers, taken apart so that prompts can be inserted into them and rewritten between blocks.

The modules of the CLIP are not modified. A kind of tower is one class: `OpenClipViT` and `TimmViT` for images,
`TextTower` for text.
"""

from typing import Any

from torch import nn

from dcp_zoo.errors import ZooError
from dcp_zoo.model.towers.blocks import KeyValue, call
from dcp_zoo.model.towers.open_clip_vit import OpenClipViT
from dcp_zoo.model.towers.text import FullRun, PrefixRun, TextTower, prompted_text
from dcp_zoo.model.towers.timm_vit import TimmViT
from dcp_zoo.model.towers.vision import VisionTower, append_prompts

__all__ = [
    "FullRun",
    "KeyValue",
    "PrefixRun",
    "TextTower",
    "VisionTower",
    "append_prompts",
    "call",
    "prompted_text",
    "text_modules",
    "text_tower",
    "vision_tower",
]


def text_modules(clip: nn.Module) -> Any:
    """The module with the text tower: the CLIP itself, or `.text` of open_clip's CustomTextCLIP and CoCa."""
    return getattr(clip, "text", clip)


def vision_tower(clip: nn.Module) -> VisionTower:
    """The image tower of a CLIP; ZooError, naming what is missing, if DCP cannot take it apart."""
    visual: Any = getattr(clip, "visual", None)
    kind: type[OpenClipViT | TimmViT]
    if hasattr(visual, "class_embedding") and hasattr(visual, "transformer"):
        kind, missing = OpenClipViT, OpenClipViT.missing(visual)
    elif all(hasattr(getattr(visual, "trunk", None), part) for part in ("blocks", "patch_embed", "num_prefix_tokens")):
        kind, missing = TimmViT, TimmViT.missing(visual)
    else:
        name = type(getattr(visual, "trunk", visual)).__name__
        raise _refused(clip, [f"an image tower of transformer blocks, with or without a class token, not {name}"])
    if missing:
        raise _refused(clip, missing)
    return kind(visual)


def text_tower(clip: nn.Module) -> TextTower:
    """The text tower of a CLIP; ZooError, naming what is missing, if DCP cannot take it apart."""
    text = text_modules(clip)
    if not hasattr(getattr(text, "transformer", None), "resblocks"):
        raise _refused(clip, [f"open_clip's own text transformer, not {type(text).__name__}"])
    if missing := TextTower.missing(text):
        raise _refused(clip, missing)
    return TextTower(text)


def _refused(clip: nn.Module, missing: list[str]) -> ZooError:
    return ZooError(
        f"DCP cannot use this CLIP ({type(clip).__name__}): it needs {', '.join(missing)}. "
        "Any open_clip model with a ViT works, such as ViT-B-16, ViT-L-14 or ViT-B-16-SigLIP2. The methods on "
        "features, such as tip-adapter-f and clap, work with every CLIP."
    )
