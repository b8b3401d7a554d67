"""The first contact with a CLIP's weights at full size, rehearsed: `results/first_contact.csv`.

    python benchmarks/first_contact.py

A Hub of the tests serves repos with the file names, keys, types and sizes of the real ones, and random values. Each
step is a process of its own with an empty home at the start: it downloads, trains on twelve photographs, classifies,
exports, and classifies again without the Hub.
"""

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from dcp_zoo.hub import CLIP_WEIGHTS_NAME
from dcp_zoo.zoo.factory import build_open_clip
from dcp_zoo.zoo.registry import ModelSpec

RESULTS = Path(__file__).parent / "results" / "first_contact.csv"
MODELS = ["dcp_vitb16", "dcp_datacomp_b32_256", "dcp_siglip2_b16", "dcp_pe_b16", "dcp_dfn_b16"]
PICKLED = {"dcp_dfn_b16"}  # whose repo has no safetensors file
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def write_repo(folder: Path, spec: ModelSpec, write_tokenizer: Callable[[Path], object]) -> dict[str, Path]:
    """Write the files of a CLIP's repo with random weights, in float32 as the real ones are; returns them by name."""
    assert spec.clip
    folder.mkdir()
    config = open_clip.get_model_config(spec.clip)
    described = open_clip.get_pretrained_cfg(spec.clip, spec.clip_pretrained)
    clip = build_open_clip(config, quick_gelu=bool(described.get("quick_gelu")))
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    if spec.name in PICKLED:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(state, folder / CLIP_WEIGHTS_NAME)
    preprocess = {name: described[name] for name in PREPROCESS}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text)
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(folder)
    return {path.name: path for path in folder.iterdir()}
