"""Sizes of models and heads, from the table and from configurations: counting parameters would import torch."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dcp_zoo.model.config import MINI_CFG, DCPConfig
from dcp_zoo.zoo.models import ModelSpec


def head_bytes(spec: ModelSpec, config: DCPConfig) -> int:
    """Size of a trained head in bytes: its parameters and its stored statistics, in float16."""
    cfg = clip_config(spec)
    return 2 * (head_parameters(cfg, config) + coupled_blocks(cfg, config) * config.n_ctx * cfg["vision_cfg"]["width"])


def head_parameters(cfg: dict[str, Any], config: DCPConfig) -> int:
    """Trainable parameters of a DCP on a CLIP: the prompts of both towers, and CMPA."""
    vision, text = cfg["vision_cfg"]["width"], cfg["text_cfg"]["width"]
    cmpa = prompt_attention_parameters(vision, text)
    if config.coupling == "bidirectional":
        cmpa += prompt_attention_parameters(text, vision)
    return config.n_ctx * (vision + text) + cmpa * (1 if config.share_cmpa else coupled_blocks(cfg, config))


def prompt_attention_parameters(dim: int, other_dim: int) -> int:
    """Parameters of `PromptAttention`: the query, two LayerNorms, attention and the MLP."""
    return (other_dim * dim + dim) + 4 * dim + (4 * dim**2 + 4 * dim) + (8 * dim**2 + 5 * dim)


def coupled_blocks(cfg: dict[str, Any], config: DCPConfig) -> int:
    return min(config.depth, cfg["vision_cfg"]["layers"] - 1, cfg["text_cfg"]["layers"] - 1)


def clip_config(spec: ModelSpec) -> dict[str, Any]:
    """Widths and layers of a model's CLIP, from open_clip's own config file, or the table for timm's image towers."""
    if spec.clip is None:
        return MINI_CFG
    package = find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    config = json.loads((Path(package.origin).parent / "model_configs" / f"{spec.clip}.json").read_text())
    if spec.width:
        config["vision_cfg"] |= {"width": spec.width, "layers": spec.blocks}
    return config
