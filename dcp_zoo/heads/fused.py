"""A trained head fused for deployment: CLIP's image tower with constant prompts, and one classifier matrix.

With the stored statistics neither the text features nor the prompts that enter a coupled block depend on the
images: the keys and values of these prompts are constants. Outputs that the next block's prompts replace are
not computed.
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
    """images (B, 3, H, W) -> the features of a `Reading` without prompts (B, ..), see `VisionTower.read`;
    what multiplies whole layers is folded into their weights."""

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

    prompts: Tensor  # (M, Dv), those that stay in the sequence
    constants: Tensor  # (K, 2, H, M, d), keys and values of those that only enter the first K blocks

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
        prompts, constants = _constants(own)
        self.register_buffer("prompts", prompts.detach())
        self.register_buffer("constants", constants.detach())
        self.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the normalised features (B, F) that the classifier reads."""
        entering = self.tower.embed(images)
        constants = [tuple(key_value) for key_value in self.constants]
        features = [self.tower.read(entering, [*constants, self.prompts], self.parts)]
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
    """Fold what multiplies a whole layer of open_clip's blocks into its weights: the layer scales, and the
    factors of QuickGELU, h * sigmoid(1.702 h) = silu(1.702 h) / 1.702. The tower gets new layers; none of
    its tensors changes."""
    if not isinstance(tower, OpenClipViT):
        return
    for block in tower.visual.transformer.resblocks:
        mlp = block.mlp
        one = mlp.c_fc.bias.new_ones(1)
        quick = one
        if type(mlp.gelu).__name__ == "QuickGELU":
            mlp.gelu = nn.SiLU()
            quick = 1.702 * one
        block.attn.out_proj = scaled_layer(block.attn.out_proj, getattr(block.ls_1, "gamma", one))
        mlp.c_fc = scaled_layer(mlp.c_fc, quick)
        mlp.c_proj = scaled_layer(mlp.c_proj, getattr(block.ls_2, "gamma", one), 1 / quick)
        block.ls_1 = nn.Identity()
        block.ls_2 = nn.Identity()


def scaled_layer(layer: nn.Linear, outputs: Tensor, inputs: Tensor | float = 1.0) -> nn.Linear:
    """A layer whose outputs are multiplied by (D,) or (1,) numbers, and its inputs by one."""
    weight = layer.weight * (outputs[:, None] * inputs)
    return layer_of(weight, layer.bias * outputs).requires_grad_(False)


def _shared(module: nn.Module) -> nn.Module:
    """A copy with tensors of its own that share the memory of the original's."""
    copies: dict[int, Any] = {}  # as `copy.deepcopy` looks them up
    for parameter in module.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        copies[id(buffer)] = buffer.detach()
    return copy.deepcopy(module, copies)


def _constants(reading: Reading) -> tuple[Tensor, Tensor]:
    """The prompts (M, Dv) that stay in the sequence, and keys and values (K, 2, H, M, d) of those before,
    which only enter one block. Without prompts, M = 0."""
    assert isinstance(reading.encoder, FrozenCLIP)
    tower = reading.encoder.vision_tower
    none = torch.zeros(0, tower.width, dtype=tower.dtype, device=reading.encoder.device)
    prompts = reading.prompts() if reading.prompts else [none]
    pairs = zip(tower.blocks, prompts, strict=False)
    entering = torch.stack([torch.stack(block.prompts(p.to(tower.dtype))) for block, p in pairs])
    return prompts[-1], entering[:-1]
