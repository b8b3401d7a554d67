"""Image encoders beside CLIP by their names: any image model of timm, with its pretrained weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch

from dcp_zoo.backbone.clip import FrozenCLIP, ImageEncoder
from dcp_zoo.errors import ZooError, as_zoo_error, nearest
from dcp_zoo.fields import Values

SUGGESTED = (  # by size
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
    "eva02_small_patch14_224.mim_in22k",
    "convnext_tiny.dinov3_lvd1689m",
    "vit_base_patch14_dinov2.lvd142m",
)
PLACES = ("hf-hub:", "local-dir:")  # timm's names for other places of a model


class EncoderRow(NamedTuple):
    """A suggested encoder: timm's name, parameters in millions, width of the features, licence."""

    name: str
    parameters: float
    features: int
    license: str


def list_encoders() -> list[EncoderRow]:
    """Image encoders that suit a head beside CLIP; any other of timm's models works, too."""
    rows = []
    for name in SUGGESTED:
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=0)
        millions = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
        rows.append(EncoderRow(name, millions, model.num_features, model.pretrained_cfg["license"]))
    return rows


def load_encoders(names: Sequence[str], clip: FrozenCLIP, stored: Sequence[Values] = ()) -> list[ImageEncoder]:
    """The image encoders of these names with their pretrained weights, on the device of a CLIP; `stored` is what a head
    says of each. ZooError for an unknown one, weights that are neither here nor can be downloaded, or others than the
    head was trained with."""
    encoders = [_load(name, clip) for name in names]
    for encoder, said in zip(encoders, stored, strict=False):
        now = encoder.fingerprint()
        if said["fingerprint"] not in (now, now[: len(now) // 2]):  # earlier versions stored the first half
            problem = f"The weights of {encoder.source} are not those that the head was trained with"
            raise ZooError(f"{problem}: use the version of timm that it names, or train the head again.")
    return encoders


def check_encoders(names: Sequence[str]) -> None:
    """ZooError for a name that timm does not know."""
    for name in names:
        if not name.startswith(PLACES) and not timm.is_model_pretrained(name):
            close = ", ".join(nearest(name, timm.list_models(pretrained=True)) or SUGGESTED)
            advice = "dcp-zoo list --recommend, or timm.list_models(pretrained=True)"
            raise ZooError(f"timm has no pretrained image model {name!r}. Nearest: {close}. All: {advice}.")


def _load(name: str, clip: FrozenCLIP) -> ImageEncoder:
    check_encoders([name])
    failed = (
        f"The image encoder {name} cannot be loaded: {{}}. Its weights are downloaded once, by timm: connect to the "
        "internet, or choose another: dcp-zoo list --recommend."
    )
    with as_zoo_error(failed, Exception):
        size, options = _size(name, clip.pretrained_cfg["input_size"][1:])
        model = timm.create_model(name, pretrained=True, num_classes=0, **options)
    return ImageEncoder(model, name, size, clip).remember_weights().to(clip.device)


def _size(name: str, size: Sequence[int]) -> tuple[tuple[int, int], Values]:
    """The pixels that a model shall read, for images of this size, and timm's options for it: this size, where the
    model has a fixed one a multiple of its patches, or its own where it has no patches."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    height, width = size
    if not model.pretrained_cfg.get("fixed_input_size"):
        return (height, width), {}
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple):
        own: tuple[int, int] = model.pretrained_cfg["input_size"][1:]
        return own, {}
    fitting = height // patch[0] * patch[0], width // patch[1] * patch[1]
    return fitting, {"img_size": fitting}
