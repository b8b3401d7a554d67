"""The miniature CLIP of `dcp_mini`: small enough for the package, with the architecture of the large ones.

It is an ordinary open_clip `CLIP` with one change: the patch embedding `visual.conv1` is hybrid, a frozen
convolutional stem (all convolutions of EfficientNet-Lite2) and a 1x1 projection to the width of the
transformer.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from timm.layers import (
    Conv2dSame,
    create_conv2d,
)  # pad as TensorFlow does, a stride of 2 more at the end
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone import MINI_CFG
from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.fields import Values

# EfficientNet-Lite2: (repeats, kernel, stride of the first block, expansion, channels)
STEM_STAGES = (
    (1, 3, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (3, 5, 2, 6, 48),
    (4, 3, 2, 6, 88),
    (4, 5, 1, 6, 120),
    (5, 5, 2, 6, 208),
    (1, 3, 1, 6, 352),
)
STEM_FIRST = 32  # channels of the first and
STEM_LAST = 1280  # of the last convolution
# the maps after stages 4 and 5 are features, too
STAGE_ENDS = (1 + 3 + 3 + 4, 1 + 3 + 3 + 4 + 4)  # blocks until then
STAGE_WIDTH = 88 + 120  # channels of both
IMAGES_PER_THREAD = 4  # in the stem at a time on a CPU


class MBConv(nn.Module):
    """Inverted residual block: expand 1x1, depthwise, project 1x1. BatchNorm is folded into the
    convolutions."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Conv2d(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = create_conv2d(hidden, hidden, kernel, stride=stride, padding="same", depthwise=True, bias=True)
        self.project = nn.Conv2d(hidden, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, h, w) -> (B, outputs, h / stride, w / stride)
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.residual else y


class Stem(nn.Module):
    """EfficientNet-Lite2 without its classifier, always frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv2dSame(3, STEM_FIRST, 3, stride=2)
        blocks = []
        inputs = STEM_FIRST
        for repeats, kernel, stride, expansion, outputs in STEM_STAGES:
            for _ in range(repeats):
                blocks.append(MBConv(inputs, outputs, kernel, stride, expansion))
                inputs = outputs
                stride = 1  # only the first block of a stage may reduce the map
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(inputs, STEM_LAST, 1)
        self.requires_grad_(False)
        # twice as fast on CPUs; untyped before torch 2.15
        cast(Any, self).to(memory_format=torch.channels_last)

    def stages(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the maps of two earlier stages (B, 88 or 120, H / 16, W / 16), then the last
        before they are widened (B, 352, H / 32, W / 32)."""
        maps = F.relu6(self.first(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        stages = []
        for start, end in pairwise([0, *STAGE_ENDS, len(self.blocks)]):
            maps = self.blocks[start:end](maps)
            stages.append(maps)
        return stages

    def widen(self, x: Tensor) -> Tensor:  # (B, 352, h, w) -> (B, 1280, h, w)
        return F.relu6(self.last(x), inplace=True)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> the last maps (B, 1280, H / 32, W / 32), and the means over positions of these and
        of the earlier stages' (B, 1280 + 208)."""
        last_maps = []
        means = []
        for chunk in cache_sized(x):
            *earlier, last = self.stages(chunk)
            last = self.widen(last)
            last_maps.append(last)
            means.append(torch.cat([maps.mean((2, 3)) for maps in (last, *earlier)], 1))
        return torch.cat(last_maps), torch.cat(means)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 1280, H / 32, W / 32)
        return self.read(x)[0]


def cache_sized(x: Tensor) -> Sequence[Tensor]:
    """A batch, on a CPU in parts whose activations stay in its cache, which takes half of the time."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return [x]
    return x.split(IMAGES_PER_THREAD * torch.get_num_threads())


class HybridPatchEmbed(nn.Module):
    """Replaces `visual.conv1`: (B, 3, H, W) -> (B, width, H / 32, W / 32)."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = Stem()
        self.proj = nn.Conv2d(STEM_LAST, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.stem(x))


def build_mini_clip(state: str | Path | None = None, cfg: Values = MINI_CFG) -> nn.Module:
    """The miniature CLIP in float32, with the weights of a safetensors file or, for None, random ones."""
    import open_clip

    with skip_init(state is not None):
        clip = open_clip.CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"], quick_gelu=cfg["quick_gelu"])
        clip.visual.conv1 = HybridPatchEmbed(cfg["vision_cfg"]["width"])
    if state is not None:
        clip.load_state_dict({name: t.float() for name, t in load_file(state).items()}, assign=True)
    return clip
