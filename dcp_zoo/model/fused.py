"""A trained head fused for deployment: CLIP's image tower with constant prompts, and one classifier matrix.

With the stored statistics neither the text features nor the prompts that enter a coupled block depend on the images:
the keys and values of these prompts are constants. Outputs that the next block's prompts replace are not computed.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dcp_zoo.errors import ZooError
from dcp_zoo.model._torch import call_linear, in_eval_mode, skip_init
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.mini import HybridPatchEmbed, Stem
from dcp_zoo.model.reading import joined
from dcp_zoo.model.text_probe.probe import nearest
from dcp_zoo.model.towers import vision_tower
from dcp_zoo.model.towers.open_clip import OpenClipBlock, OpenClipViT, VisionTower


class ImageTower(nn.Module):
    """images (B, 3, H, W) -> normalised features (B, E), by an image tower without prompts whose blocks are folded."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual: Any = visual
        self.tower: VisionTower = vision_tower(self)
        fold(self.tower)

    def forward(self, images: Tensor) -> Tensor:
        return self.tower.features(self.tower.run(self.tower.embed(images), ()))


class FusedHead(ImageTower):
    """images (B, 3, H, W) -> logits (B, C), returned by `Head.fuse`. It needs no text tower. `config` holds sizes and
    options from which it can be rebuilt, and `info` class names, preprocessing and origin, both plain JSON; `visual` is
    a copy of an open_clip CLIP's image tower, whose blocks may be changed."""

    prompts: Tensor  # (M, Dv), those that stay in the sequence
    constants: Tensor  # (K, 2, H, M, d), keys and values of those that only enter K blocks from config["first"] on
    classifier: Tensor  # (C, E), or (C, 2E)
    bias: Tensor  # (C,)
    whitening: Tensor  # (E, E), and
    means: Tensor  # (C, E), see `TextProbe.measure`, of a head that can reject

    def __init__(
        self, config: dict[str, Any], info: dict[str, Any], visual: nn.Module, original: nn.Module | None = None
    ) -> None:
        super().__init__(visual)
        self.config, self.info = config, info
        self.classnames: list[str] = info["classnames"]
        self.pretrained_cfg = info["preprocessing"]  # as timm and `create_transform` read it
        self.original = None if original is None else ImageTower(original)
        for name, shape in config["shapes"].items():
            self.register_buffer(name, torch.empty(shape, device="meta"))
        self.requires_grad_(False)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the normalised features (B, E) that the classifier reads; of two readings (B, 2E)."""
        tower, first = self.tower, self.config["first"]
        x = tower.run(tower.embed(images), (), stop=first)
        constants = [(self.constants[k, 0], self.constants[k, 1]) for k in range(len(self.constants))]
        own = tower.features(tower.run(x, [*constants, self.prompts], first))
        if self.config["readings"] == 1:
            return own
        plain = tower.features(tower.run(x, (), first)) if self.original is None else self.original(images)
        return joined([own, plain])

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), normalised as in `info` -> logits (B, C)."""
        return self.classify(self.encode_image(images))

    def classify(self, features: Tensor) -> Tensor:
        """Normalised features (B, F) -> logits (B, C), in the precision of the classifier's weights."""
        return features.to(self.classifier.dtype) @ self.classifier.T + self.bias

    def fuse(self) -> "FusedHead":
        """Itself."""
        return self

    @property
    def rejects(self) -> bool:
        """Whether there is a threshold to reject images."""
        return "threshold" in self.info

    def distances(self, features: Tensor) -> Tensor:
        """Normalised features (B, F) -> `TextProbe.distance` (B,), of a head that can reject."""
        plain = features[:, -len(self.whitening) :] * math.sqrt(self.config["readings"])
        return nearest(plain, self.whitening, self.means)


class Attention(nn.Module):
    """open_clip's attention in linear layers, which torch can quantise; `gamma`, (D,) or 1, scales its output."""

    def __init__(self, attn: Any, gamma: Tensor | float) -> None:
        super().__init__()
        d, self.num_heads = attn.out_proj.weight.shape[0], attn.num_heads
        self.query = linear_layer(attn.in_proj_weight[:d], attn.in_proj_bias[:d])
        self.key_value = linear_layer(attn.in_proj_weight[d:], attn.in_proj_bias[d:])
        self.out_proj = scaled_layer(attn.out_proj, gamma)


class FoldedBlock(OpenClipBlock):
    """open_clip's block after `fold`."""

    def project(self, normed: Tensor, parts: str) -> Tensor:
        attn = self.module.attn
        return call_linear(attn.query if parts == "q" else attn.key_value, normed)


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
        block.attn = Attention(block.attn, gamma_1)
        mlp.c_fc, mlp.c_proj = scaled_layer(mlp.c_fc, quick), scaled_layer(mlp.c_proj, gamma_2, 1 / quick)
        block.ls_1 = block.ls_2 = nn.Identity()
    tower.blocks = [FoldedBlock(block) for block in tower.visual.transformer.resblocks]


def linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with these tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(t.detach(), requires_grad=False) for t in (weight, bias))
    return layer


def scaled_layer(layer: nn.Linear, gamma: Tensor | float, factor: float = 1.0) -> nn.Linear:
    """A layer whose output is multiplied by `gamma`, (D,) or 1, and its input by `factor`."""
    rows = gamma[:, None] if isinstance(gamma, Tensor) else gamma
    return linear_layer(layer.weight * (rows * factor), layer.bias * gamma)


@torch.no_grad()
def fuse(model: Any) -> FusedHead:
    """Fuse a model with stored statistics; see `Head.fuse`. Unchanged frozen weights are shared with it."""
    with in_eval_mode(model):  # do not pool over a batch
        reads, state = model.reads, _constants(model)
        state["classifier"], state["bias"] = model.linear()
        if not model.cannot_reject:
            state["whitening"], state["means"] = model.text_probe.measure(model.classes)
    shapes = {name: list(t.shape) for name, t in state.items()}
    config = {"clip": _tower_config(model.readings[0].encoder), "first": model.first_block, "shapes": shapes}
    plain = reads[-1].encoder
    config |= {"readings": len(reads), "has_original": plain is not reads[0].encoder}
    original = _shared(plain.visual) if config["has_original"] else None
    fused = FusedHead(config, fused_info(model), _shared(reads[0].encoder.visual), original)
    state |= {name: t for name, t in fused.state_dict().items() if name not in state}
    fused.load_state_dict({name: t.detach() for name, t in state.items()}, assign=True)
    return fused.eval()


def _shared(visual: nn.Module) -> nn.Module:
    """A copy that shares all tensors."""
    return copy.deepcopy(visual, {id(t): t for t in (*visual.parameters(), *visual.buffers())})


def _constants(model: Any) -> dict[str, Tensor]:
    """The prompts that stay in the sequence, and keys and values of those that do not. Without prompts, M = 0."""
    reading = model.readings[0]
    tower = reading.encoder.vision_tower
    prompts = (reading.prompts and reading.prompts()) or [
        torch.zeros(0, tower.width, dtype=tower.dtype, device=model.device)
    ]
    last, blocks = len(prompts) - 1, tower.blocks[model.first_block :]
    constant = min(last + (last == len(blocks) - 1), len(blocks))  # the last block computes the pooled tokens only
    entering = [torch.stack(block.prompts(p.to(tower.dtype))) for block, p in zip(blocks, prompts, strict=False)]
    return {"prompts": prompts[-1], "constants": torch.stack(entering)[:constant]}


def _tower_config(model: FrozenCLIP) -> dict[str, Any] | None:
    """open_clip's config of the image tower, from which `load_fused` rebuilds it; None for towers that have none."""
    config, tower = getattr(model.clip, "open_clip_config", None), model.vision_tower
    if config is not None or not (isinstance(tower, OpenClipViT) and tower.token_only):
        return config
    visual, block = tower.visual, tower.visual.transformer.resblocks[0]
    if type(visual.conv1) not in (nn.Conv2d, HybridPatchEmbed) or visual.proj is None:
        return None
    return {
        "embed_dim": visual.proj.shape[1],
        "quick_gelu": type(block.mlp.gelu).__name__ == "QuickGELU",
        "hybrid": isinstance(visual.conv1, HybridPatchEmbed),
        "vision_cfg": {
            "image_size": visual.image_size,
            "patch_size": visual.patch_size,
            "width": tower.width,
            "layers": len(tower.blocks),
            "head_width": tower.width // block.attn.num_heads,
            "mlp_ratio": block.mlp.c_fc.out_features / tower.width,
            "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        },
    }


def fused_info(model: Any) -> dict[str, Any]:
    """Class names, preprocessing, origin, and the rejection threshold if these classes have one, as plain JSON."""
    cfg = model.pretrained_cfg
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {
        "model": model.encoder.architecture,
        "tag": cfg.get("tag"),
        **({} if model.cannot_reject else {"threshold": model.rejection_threshold()}),
        "classnames": list(model.classnames),
        "preprocessing": {k: list(cfg[k]) if isinstance(cfg[k], tuple) else cfg[k] for k in keys if k in cfg},
    }


def load_fused(path: str | Path) -> FusedHead:
    """Load what `dcp-zoo export --format safetensors` wrote, memory-mapped. ZooError for no such file, or another."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config, info = json.loads(metadata["config"]), json.loads(metadata["dcp"])
    except Exception as error:  # missing, damaged, or another kind of file
        raise ZooError(f"{path} is not a fused model ({error!r}): create one with dcp-zoo export.") from error
    original = _rebuilt(**config["clip"]) if config["has_original"] else None
    fused = FusedHead(config, info, _rebuilt(**config["clip"]), original)
    fused.load_state_dict(state, assign=True)
    for module in fused.modules():
        if isinstance(module, Stem):
            module.use_channels_last()
    return fused.eval()


def _rebuilt(vision_cfg: dict[str, Any], hybrid: bool = False, **config: Any) -> nn.Module:
    """The image tower of a config of `_tower_config`, without its weights."""
    import open_clip

    text = {"context_length": 4, "vocab_size": 4, "width": 64, "heads": 1, "layers": 1}  # not needed
    # timm's towers have buffers that no file holds
    with skip_init() if "timm_model_name" in vision_cfg else torch.device("meta"):
        visual = open_clip.CustomTextCLIP(vision_cfg=vision_cfg, text_cfg=text, **config).visual
        if hybrid:
            visual.conv1 = HybridPatchEmbed(vision_cfg["width"])
    return visual
