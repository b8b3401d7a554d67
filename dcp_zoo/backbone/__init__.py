"""The frozen CLIP: its towers, its tokenizer, its inputs, and the miniature that the package brings."""

from pathlib import Path

import lazy_loader

from dcp_zoo.fields import Values

MINI_WEIGHTS = Path(__file__).parents[1] / "weights" / "dcp_mini" / "clip.safetensors"
# The miniature's stem scales pixels to (x - 127) / 128; mean and std are equivalent for a [0, 1] tensor.
MINI_CFG: Values = {
    "embed_dim": 512,
    "vision_cfg": {
        "image_size": 192,
        "patch_size": 32,
        "width": 256,
        "layers": 6,
        "head_width": 64,
        "mlp_ratio": 2,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 192,
        "heads": 3,
        "layers": 6,
        "mlp_ratio": 2,
    },
    "quick_gelu": True,
    "image_size": 192,
    "mean": (127 / 255,) * 3,
    "std": (128 / 255,) * 3,
}

# last, as with EAGER_IMPORT it imports modules that read the names above
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
