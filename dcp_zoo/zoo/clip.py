"""CLIP itself: built by open_clip with weights from the Hub, or the bundled miniature."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dcp_zoo.errors import ZooError
from dcp_zoo.model._init import skip_init
from dcp_zoo.model.mini import MINI_WEIGHTS, build_mini_clip
from dcp_zoo.zoo.hub import fetch_clip
from dcp_zoo.zoo.registry import ModelSpec


def check_tag(spec: ModelSpec, tag: str) -> str:
    """Return `tag` if it names CLIP weights for this model; otherwise ZooError lists open_clip's tags for it."""
    valid = [spec.clip_pretrained] if spec.clip is None else open_clip.list_pretrained_tags_by_model(spec.clip)
    if tag not in valid:
        raise ZooError(f"{spec.name} has no CLIP weights {tag!r}: choose from {', '.join(valid)}.")
    return tag


def build_clip(
    spec: ModelSpec, clip_source: str, *, with_weights: bool, cache_dir: str | Path | None = None
) -> nn.Module:
    """CLIP itself, in float32, with QuickGELU for weights trained with it (OpenAI's)."""
    if spec.clip is None:
        return build_mini_clip(MINI_WEIGHTS if with_weights else None)
    source = open_clip.get_pretrained_cfg(spec.clip, clip_source)
    quick_gelu = bool(source.get("quick_gelu", False))
    if with_weights and source.get("hf_hub"):
        fetch_clip(source["hf_hub"], cache_dir)
    try:
        with skip_init(with_weights):
            clip = open_clip.CLIP(**open_clip.get_model_config(spec.clip), quick_gelu=quick_gelu)
        if with_weights:
            load_clip(clip, open_clip.download_pretrained(source, cache_dir=str(cache_dir) if cache_dir else None))
    except (RuntimeError, SafetensorError) as error:
        raise ZooError(
            f"open_clip cannot load the {clip_source} weights of {spec.clip}: {error}. If this names a file, delete it "
            "and try again. For other weights, pass clip_pretrained=TAG."
        ) from error
    uses = {type(block.mlp.gelu).__name__ for block in clip.visual.transformer.resblocks}
    if uses != {"QuickGELU" if quick_gelu else "GELU"}:
        raise RuntimeError(
            f"open_clip built {spec.clip} with {uses}, but {clip_source} weights need QuickGELU={quick_gelu}"
        )
    return clip


def load_clip(clip: nn.Module, path: str | Path) -> None:
    """Load CLIP's weights strictly. A safetensors file with exactly its tensors stays memory-mapped until used;
    open_clip's loader converts every other format it supports."""
    if Path(path).suffix == ".safetensors":
        state = load_file(path)
        if {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in clip.state_dict().items()}:
            clip.load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
            return
    open_clip.load_checkpoint(clip, str(path))


def build_tokenizer(spec: ModelSpec) -> Callable[..., torch.Tensor] | None:
    """The tokenizer of a model's text tower; None means open_clip's default."""
    if spec.clip is None:
        return None
    return open_clip.get_tokenizer(spec.clip)
