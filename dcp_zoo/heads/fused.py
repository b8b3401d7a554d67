"""A trained head fused for deployment: CLIP's image tower with constant prompts, and one classifier matrix.

With the stored statistics neither the text features nor the prompts that enter a coupled block depend on the images:
the keys and values of these prompts are constants. Outputs that the next block's prompts replace are not computed.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dcp_zoo.backbone._torch import in_eval_mode
from dcp_zoo.backbone.clip import PREPROCESSING, FrozenCLIP, join, joined, parts_of
from dcp_zoo.backbone.towers import vision_tower
from dcp_zoo.backbone.towers.open_clip import OpenClipViT, VisionTower
from dcp_zoo.fields import Values
from dcp_zoo.probe.model import Distance, gated


class ImageTower(nn.Module):
    """images (B, 3, H, W) -> what is read of an image tower without prompts (B, E) or (B, E + V), see
    `VisionTower.read`; its blocks are folded."""

    def __init__(self, reading: Any) -> None:
        super().__init__()
        self.visual: Any = _shared(reading.encoder.visual)
        self.tower: VisionTower = vision_tower(self)
        self.parts = len(reading.widths)
        fold(self.tower)

    def forward(self, images: Tensor) -> Tensor:
        return self.tower.read(self.tower.embed(images), parts=self.parts)


class FusedHead(ImageTower):
    """images (B, 3, H, W) -> logits (B, C) of `model`; `Head.fuse` returns it. It needs no text tower. `info` holds
    class names, preprocessing, origin and the threshold to reject, if these classes have one, as plain JSON; `visual`
    is a copy of CLIP's image tower, with other blocks."""

    prompts: Tensor  # (M, Dv), those that stay in the sequence
    constants: Tensor  # (K, 2, H, M, d), keys and values of those that only enter the first K blocks
    classifier: Tensor  # (C, F), with a gate (2C, F): the text's logits come last
    bias: Tensor  # (C,), (2C,)
    gate: Tensor  # (3,), of a head that has one
    unit: Tensor  # see `Distance`; of a head that can reject, or has a gate
    means: Tensor
    examples: Tensor
    margin: Tensor

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        own, *others = reads = model.reads
        super().__init__(own)
        self.all_parts = parts_of(reads)
        self.plain_parts = parts_of([reading for reading in others if reading.encoder is own.encoder])
        self.others = nn.ModuleList(
            ImageTower(reading) if isinstance(reading.encoder, FrozenCLIP) else _shared(reading.encoder)
            for reading in others
            if reading.encoder is not own.encoder
        )
        with in_eval_mode(model):  # do not pool over a batch
            tensors = _constants(own)
            linear, probe = model.linear(), model.gated_probe
            if probe is not None:
                linear = [
                    torch.cat([own, probe.text_scale * text]) for own, text in zip(linear, join(reads), strict=True)
                ]
                tensors["gate"] = probe.gate
            tensors["classifier"], tensors["bias"] = linear
            if probe is not None or not model.cannot_reject:
                tensors |= model.text_probe.measure(model.classes)._asdict()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach())
        cfg, self.classnames = model.pretrained_cfg, model.classnames
        read = {k: list(cfg[k]) if isinstance(cfg[k], tuple) else cfg[k] for k in PREPROCESSING if k in cfg}
        self.pretrained_cfg = read  # as timm and `create_transform` read it
        self.info: Values = {
            "model": model.encoder.architecture,
            "tag": cfg.get("tag"),
            **({} if model.cannot_reject else {"threshold": model.rejection_threshold()}),
            "classnames": self.classnames,
            "preprocessing": read,
        }
        self.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the normalised features (B, F) that the classifier reads."""
        tower, entering = self.tower, self.tower.embed(images)
        constants = [(self.constants[k, 0], self.constants[k, 1]) for k in range(len(self.constants))]
        features = [tower.read(entering, [*constants, self.prompts], self.parts)]
        if self.plain_parts:
            features.append(tower.read(entering, (), self.plain_parts))
        return joined([*features, *(encoder(images) for encoder in self.others)], self.all_parts)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), normalised as in `info` -> logits (B, C)."""
        return self.classify(self.encode_image(images))

    def classify(self, features: Tensor) -> Tensor:
        """Normalised features (B, F) -> logits (B, C), in the precision of the classifier."""
        logits = features.to(self.classifier.dtype) @ self.classifier.T + self.bias
        if not hasattr(self, "gate"):
            return logits
        own, text = logits.chunk(2, 1)
        return gated(own, text, self.distances(features, examples=False), self.gate)

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    def fuse(self) -> "FusedHead":
        """Itself."""
        return self

    def distances(self, features: Tensor, examples: bool = True) -> Tensor:
        """Normalised features (B, F) -> `TextProbe.distance` (B,), of a head that can reject."""
        return Distance(self.unit, self.means, self.examples, self.margin)(features, examples)


@torch.no_grad()
def fold(tower: VisionTower) -> None:
    """Fold what multiplies a whole layer of open_clip's blocks into its weights: the layer scales, and the factors of
    QuickGELU, h * sigmoid(1.702 h) = silu(1.702 h) / 1.702. The tower gets new layers; none of its tensors changes."""
    if not isinstance(tower, OpenClipViT):
        return
    for block in tower.visual.transformer.resblocks:
        mlp, quick = block.mlp, 1.0
        if type(mlp.gelu).__name__ == "QuickGELU":
            mlp.gelu, quick = nn.SiLU(), 1.702
        gamma_1, gamma_2 = (getattr(layer_scale, "gamma", 1.0) for layer_scale in (block.ls_1, block.ls_2))
        block.attn.out_proj = scaled_layer(block.attn.out_proj, gamma_1)
        mlp.c_fc, mlp.c_proj = scaled_layer(mlp.c_fc, quick), scaled_layer(mlp.c_proj, gamma_2, 1 / quick)
        block.ls_1 = block.ls_2 = nn.Identity()


def scaled_layer(layer: nn.Linear, gamma: Tensor | float, factor: float = 1.0) -> nn.Linear:
    """A layer whose output is multiplied by `gamma`, (D,) or 1, and its input by `factor`."""
    rows = gamma[:, None] if isinstance(gamma, Tensor) else gamma
    weight, bias = layer.weight * (rows * factor), layer.bias * gamma
    scaled = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    scaled.weight, scaled.bias = (nn.Parameter(t.detach(), requires_grad=False) for t in (weight, bias))
    return scaled


def _shared(visual: nn.Module) -> Any:
    """A copy with tensors of its own that share the memory of the original's."""
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in visual.parameters()}
    return copy.deepcopy(visual, {**frozen, **{id(t): t.detach() for t in visual.buffers()}})


def _constants(reading: Any) -> dict[str, Tensor]:
    """The prompts that stay in the sequence, and keys and values of those that do not. Without prompts, M = 0."""
    tower = reading.encoder.vision_tower
    none = torch.zeros(0, tower.width, dtype=tower.dtype, device=reading.encoder.device)
    prompts = reading.prompts() if reading.prompts else [none]
    last, blocks = len(prompts) - 1, len(tower.blocks)
    constant = min(last + (last == blocks - 1), blocks)  # the last block computes the pooled tokens only
    entering = [torch.stack(block.prompts(p.to(tower.dtype))) for block, p in zip(tower.blocks, prompts, strict=False)]
    return {"prompts": prompts[-1], "constants": torch.stack(entering)[:constant]}
