"""CLIP itself: built by open_clip with weights from the Hub, or the bundled miniature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.model._init import skip_init
from dcp_zoo.model.config import MINI_WEIGHTS
from dcp_zoo.model.mini import build_mini_clip
from dcp_zoo.zoo.hub import clip_repo_config, fetch_clip
from dcp_zoo.zoo.models import CLIP_REPO, ModelSpec


def check_tag(spec: ModelSpec, tag: str) -> str:
    """Return `tag` if it names CLIP weights for this model; otherwise ZooError lists open_clip's tags for it."""
    own = spec.clip is None or spec.clip.startswith(CLIP_REPO)
    valid = [spec.clip_pretrained] if own else open_clip.list_pretrained_tags_by_model(spec.clip)
    if tag not in valid:
        raise ZooError(f"{spec.name} has no CLIP weights {tag!r}: choose from {', '.join(valid)}.")
    return tag


def build_clip(
    spec: ModelSpec, clip_source: str, *, with_weights: bool, cache_dir: str | Path | None = None
) -> nn.Module:
    """CLIP itself, in float32, with QuickGELU for weights trained with it (such as OpenAI's)."""
    if spec.clip is None:
        return build_mini_clip(MINI_WEIGHTS if with_weights else None)
    source, config = _described(spec, clip_source, cache_dir)
    if with_weights and source.get("hf_hub"):
        fetch_clip(source["hf_hub"], cache_dir)
    try:
        with skip_init(with_weights):
            clip = build_open_clip(config, quick_gelu=bool(source.get("quick_gelu", config.get("quick_gelu", False))))
        if with_weights:
            load_clip(clip, open_clip.download_pretrained(source, cache_dir=str(cache_dir) if cache_dir else None))
    except (RuntimeError, SafetensorError) as error:
        raise ZooError(
            f"open_clip cannot load the {clip_source} weights of {spec.clip}: {error}. If this names a file, delete it "
            "and try again. For other weights, pass clip_pretrained=TAG."
        ) from error
    return clip.eval()


def _described(spec: ModelSpec, tag: str, cache_dir: str | Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the weights are, and the sizes of the towers, as open_clip describes both."""
    assert spec.clip
    if spec.clip.startswith(CLIP_REPO):
        repo = spec.clip.removeprefix(CLIP_REPO)
        return {"hf_hub": f"{repo}/"}, clip_repo_config(repo, cache_dir)["model_cfg"]
    return open_clip.get_pretrained_cfg(spec.clip, tag), open_clip.get_model_config(spec.clip)


def build_open_clip(config: dict[str, Any], quick_gelu: bool) -> nn.Module:
    """The CLIP of one of open_clip's model configs, with random weights: what `open_clip.create_model` chooses."""
    custom = config.get("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    sizes = {name: value for name, value in config.items() if name not in ("custom_text", "quick_gelu")}
    clip = kind(**sizes, quick_gelu=quick_gelu)
    # from which `load_fused` rebuilds an image tower
    described = ("embed_dim", "vision_cfg")
    clip.open_clip_config = {name: config[name] for name in described} | {"quick_gelu": quick_gelu}
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


def build_tokenizer(spec: ModelSpec, cache_dir: str | Path | None = None) -> Callable[..., torch.Tensor] | None:
    """The tokenizer of a model's text tower; None means open_clip's default.

    Raises:
        ZooError: a tokenizer of Hugging Face, whose package is not installed or whose files cannot be downloaded.
    """
    if spec.clip is None:
        return None
    try:
        return open_clip.get_tokenizer(spec.clip, cache_dir=str(cache_dir) if cache_dir else None)
    except Exception as error:  # of `transformers`, which reports a missing file in many ways
        text_cfg = _described(spec, spec.clip_pretrained, cache_dir)[1].get("text_cfg", {})
        wanted = text_cfg.get("hf_tokenizer_name", spec.clip)
        import_extra("transformers", "tokenizers")
        raise ZooError(
            f"The tokenizer of {spec.clip} cannot be loaded from the Hub repo {wanted!r}: {error}. Check the "
            "connection, or pass your own: create_model(..., tokenizer=...)."
        ) from error
