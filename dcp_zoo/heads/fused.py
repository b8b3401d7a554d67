"""A trained head fused for deployment: CLIP's image tower with constant prompts, and one classifier matrix.

With the stored statistics neither the text features nor the prompts that enter a coupled block depend on the
images. Outputs that the next block's prompts replace are not computed.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcp_zoo.backbone._torch import layer_of
from dcp_zoo.backbone.clip import FrozenCLIP, Reading, joined, parts_of
from dcp_zoo.backbone.towers import vision_tower
from dcp_zoo.backbone.towers.open_clip import OpenClipViT, VisionTower
from dcp_zoo.fields import Values
from dcp_zoo.probe.model import Distance, gated


class ImageTower(nn.Module):
    """images (B, 3, H, W) -> the features of a `Reading` without prompts (B, ..), see `VisionTower.read`."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.visual = _shared(reading.encoder.visual)
        self.tower: VisionTower = vision_tower(self)
        self.parts = len(reading.widths)
        fold(self.tower)

    def forward(self, images: Tensor) -> Tensor:
        return self.tower.read(self.tower.embed(images), parts=self.parts)


class FusedClassifier(nn.Module):
    """Normalised features (B, F) -> logits (B, C), in the precision of the weights.

    Args:
        adapter: of an `AdapterHead`.
        tensors: those below, of which it keeps copies; those of `Distance` of a head that can reject or has
            a gate.
    """

    weight: Tensor  # (C, F), with a gate (2C, F): the text's logits come last
    bias: Tensor  # (C,), (2C,)
    gate: Tensor  # (3,), see `gated`
    unit: Tensor  # see `Distance`
    means: Tensor
    examples: Tensor
    margin: Tensor

    def __init__(self, adapter: nn.Module | None = None, **tensors: Tensor) -> None:
        super().__init__()
        self.adapter = copy.deepcopy(adapter or nn.Identity())
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        logits = self.adapter(features.to(self.weight.dtype)) @ self.weight.T + self.bias
        if not hasattr(self, "gate"):
            return logits
        own, text = logits.chunk(2, 1)
        return gated(own, text, self.distances(features, examples=False), self.gate)

    def distances(self, features: Tensor, examples: bool = True) -> Tensor:
        """Normalised features (B, F) -> `TextProbe.distance` (B,), of a head that can reject."""
        return Distance(self.unit, self.means, self.examples, self.margin)(features, examples)


class FusedHead(ImageTower):
    """images (B, 3, H, W) -> logits (B, C), as `Head.fuse` returns it. It needs no text tower.

    Args:
        reads: the readings of the head, the method's own first.
        classifier: of the features that they give.
        info: class names, preprocessing, origin and, if these classes have them, the threshold to reject
            and the head's promises, as plain JSON.
    """

    prompts: Tensor  # (K + 1, M, Dv), that enter the first blocks; (0,) without

    @torch.no_grad()
    def __init__(self, reads: Sequence[Reading], classifier: FusedClassifier, info: Values) -> None:
        own, *others = reads
        super().__init__(own)
        self.classifier = classifier
        self.info = info
        self.classnames: list[str] = info["classnames"]
        self.pretrained_cfg: Values = info["preprocessing"]  # as timm and `create_transform` read it
        self.all_parts = parts_of(reads)
        self.plain_parts = 0  # that are read of the same tower without prompts
        self.others = nn.ModuleList()
        for reading in others:
            if reading.encoder is own.encoder:
                self.plain_parts = len(reading.widths)
            elif isinstance(reading.encoder, FrozenCLIP):
                self.others.append(ImageTower(reading))
            else:
                self.others.append(_shared(reading.encoder))
        prompts = [prompt.to(self.tower.dtype) for prompt in own.prompts()] if own.prompts else []
        self.register_buffer("prompts", torch.stack(prompts) if prompts else torch.empty(0))
        self.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the normalised features (B, F) that the classifier reads."""
        entering = self.tower.embed(images)
        features = [self.tower.read(entering, [*self.prompts], self.parts)]
        if self.plain_parts:
            features.append(self.tower.read(entering, (), self.plain_parts))
        for encoder in self.others:
            features.append(encoder(images))
        return joined(features, self.all_parts)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), normalised as in `info` -> logits (B, C)."""
        return self.classify(self.encode_image(images))

    def classify(self, features: Tensor) -> Tensor:
        """Normalised features (B, F) -> logits (B, C), in the precision of the classifier."""
        return self.classifier(features)

    @property
    def device(self) -> torch.device:
        return self.classifier.weight.device

    def fuse(self) -> "FusedHead":
        """Itself."""
        return self

    def distances(self, features: Tensor) -> Tensor:
        """Normalised features (B, F) -> `TextProbe.distance` (B,), of a head that can reject."""
        return self.classifier.distances(features)


@torch.no_grad()
def fold(tower: VisionTower) -> None:
    """Fold the factors of QuickGELU, h * sigmoid(1.702 h) = silu(1.702 h) / 1.702, into the layers of
    open_clip's blocks. The tower gets new layers; none of its tensors changes."""
    if not isinstance(tower, OpenClipViT):
        return
    for block in tower.visual.transformer.resblocks:
        mlp = block.mlp
        if type(mlp.gelu).__name__ == "QuickGELU":
            mlp.c_fc = layer_of(1.702 * mlp.c_fc.weight, 1.702 * mlp.c_fc.bias)
            mlp.gelu = nn.SiLU()
            mlp.c_proj = layer_of(mlp.c_proj.weight / 1.702, mlp.c_proj.bias)
    tower.visual.requires_grad_(False)


def _shared(module: nn.Module) -> nn.Module:
    """A copy with tensors of its own that share the memory of the original's."""
    copies: dict[int, Any] = {}  # as `copy.deepcopy` looks them up
    for parameter in module.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        copies[id(buffer)] = buffer.detach()
    return copy.deepcopy(module, copies)
