"""A trained head fused for deployment: an image tower with constant prompts, and one classifier matrix.

With the stored statistics neither the text features nor the prompts that enter a coupled block depend on the images:
the keys and values of these prompts are constants. A block's output at its prompts is discarded if the next block has
new prompts, so it is not computed.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model._init import skip_init
from dcp_zoo.model._linear import call_linear
from dcp_zoo.model.mini import HybridPatchEmbed
from dcp_zoo.model.towers import VisionTower, append_prompts, vision_tower
from dcp_zoo.model.towers.blocks import Block, merge_heads, split_heads
from dcp_zoo.model.towers.open_clip_vit import OpenClipViT
from dcp_zoo.model.towers.vision import attend


class FusedBlock(nn.Module):
    """One transformer block; `prompts` (2, H, M, d) are the keys and values of its constant prompts, if any."""

    prompts: torch.Tensor | None

    def __init__(self, width: int, hidden: int, heads: int, n_ctx: int, activation: nn.Module) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)
        prompts = torch.zeros(2, heads, n_ctx, width // heads) if n_ctx else None
        self.register_buffer("prompts", prompts)

    def forward(self, x: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """x (B, L, D) -> its first `rows` tokens, default all, after this block."""
        normed = self.ln_1(x)
        query = split_heads(call_linear(self.query, normed[:, :rows]), self.heads)  # (B, H, rows, d)
        key, value = (split_heads(y, self.heads) for y in call_linear(self.key_value, normed).chunk(2, -1))
        if self.prompts is not None:
            prompts = self.prompts[:, None].expand(-1, x.shape[0], -1, -1, -1)
            key, value = torch.cat([key, prompts[0]], 2), torch.cat([value, prompts[1]], 2)
        attended = merge_heads(F.scaled_dot_product_attention(query, key, value))
        x = x[:, :rows] + call_linear(self.out, attended)
        return x + call_linear(self.c_proj, self.activation(call_linear(self.c_fc, self.ln_2(x))))


class FusedDCP(nn.Module):
    """images (B, 3, H, W) -> logits (B, C), returned by `DCP.fuse`. Needs neither a text tower nor open_clip.

    Attributes:
        config: sizes and options from which the module can be rebuilt, plain JSON.
        info: class names, preprocessing and origin, plain JSON; stored as metadata in exported files.
    """

    prompts: torch.Tensor
    classifier: torch.Tensor
    bias: torch.Tensor

    def __init__(self, config: dict[str, Any], info: dict[str, Any], frozen: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.info = config, info
        self._build(config, frozen)
        self.register_buffer("prompts", torch.empty(config["n_ctx"], config["width"]))
        self.register_buffer("classifier", torch.empty(config["num_classes"], config["embed_dim"] or config["width"]))
        self.register_buffer("bias", torch.empty(config["num_classes"]))
        self.requires_grad_(False)

    def _build(self, config: dict[str, Any], patch_embed: nn.Module | None) -> None:
        """The image tower; a `patch_embed` that `config` does not describe is used as it is."""
        width, n_ctx = config["width"], config["n_ctx"]
        self.patch_embed = patch_embed or _patch_embed(config)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config["tokens"], width))
        self.ln_pre = nn.LayerNorm(width) if config["ln_pre"] else nn.Identity()
        self.blocks = nn.ModuleList(
            FusedBlock(
                width, config["hidden"], config["heads"], n_ctx if i < config["constant"] else 0, _activation(config)
            )
            for i in range(config["layers"])
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config["embed_dim"], bias=False) if config["embed_dim"] else nn.Identity()

    @property
    def classnames(self) -> list[str]:
        return self.info["classnames"]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) -> normalised features (B, E)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([class_token, patches], 1) + self.positional_embedding)
        for i, block in enumerate(self.blocks):
            if i == self.config["constant"]:  # from here on the prompts are part of the sequence
                x = torch.cat([x, self.prompts.expand(x.shape[0], -1, -1)], 1)
            x = block(x, 1 if i == len(self.blocks) - 1 else None)
        return F.normalize(call_linear(self.proj, self.ln_post(x[:, 0])), dim=-1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W), normalised as in `info` -> logits (B, C)."""
        return self.logits(self.encode_image(images))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Normalised features (B, E) -> logits (B, C)."""
        return features @ self.classifier.T + self.bias


class FusedTower(FusedDCP):
    """The same around an image tower of any other kind, which is kept as its library builds it."""

    constants: torch.Tensor

    def _build(self, config: dict[str, Any], visual: nn.Module | None) -> None:
        self.visual = visual
        self.tower: VisionTower = vision_tower(self)
        self.register_buffer("constants", torch.empty(config["constant"], 2, *config["prompt_heads"]))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) -> normalised features (B, E)."""
        tower, constant = self.tower, self.config["constant"]
        x = tower.embed(images)
        for i, block in enumerate(tower.blocks):
            if i == constant:
                x = append_prompts(x, self.prompts)
            given = (self.constants[i, 0], self.constants[i, 1]) if i < constant else None
            x = attend(block, x, given, tower.pooled if i == len(tower.blocks) - 1 else x.shape[1])
        return tower.features(x)


@torch.no_grad()
def fuse(model: Any) -> FusedDCP:
    """Fuse a calibrated model; see `DCP.fuse`. Unchanged frozen weights are shared with it."""
    training = model.training
    model.eval()  # do not pool over a batch
    try:
        own = _has_own_kind(model.vision_tower)
        kind, config, state = (FusedDCP, _config(model), _state(model)) if own else _fused_tower(model)
        state["classifier"], state["bias"] = model.linear()
    finally:
        model.train(training)
    frozen = None if config["patch_embed"] else _shallow(model.visual.conv1 if own else model.visual)
    with torch.device("meta"):
        fused = kind(config, describe(model), frozen)
    fused.load_state_dict({name: t.detach() for name, t in state.items()}, assign=True)
    return fused.eval()


def describe(model: Any) -> dict[str, Any]:
    """Class names, preprocessing, rejection threshold if there is one for these classes, and origin of a model as plain
    JSON."""
    cfg = model.pretrained_cfg
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {
        "model": model.architecture,
        "tag": cfg.get("tag"),
        **({} if model.cannot_reject else {"threshold": model.rejection_threshold()}),
        "classnames": list(model.classnames),
        "preprocessing": {k: list(cfg[k]) if isinstance(cfg[k], tuple) else cfg[k] for k in keys if k in cfg},
    }


def load_fused(path: str | Path) -> FusedDCP:
    """Load a file written by `dcp-zoo export --format safetensors`; the weights stay memory-mapped until used.

    Raises:
        ZooError: no such file, or not a fused model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config, info = json.loads(metadata["config"]), json.loads(metadata["dcp"])
    except Exception as error:  # missing, damaged, or another kind of file
        raise ZooError(f"{path} is not a fused model ({error!r}): create one with dcp-zoo export.") from error
    frozen = _rebuilt(config["open_clip"]) if config.get("open_clip") else None
    with torch.device("meta"):
        fused = (FusedTower if frozen else FusedDCP)(config, info, frozen)
    fused.load_state_dict(state, assign=True)
    if frozen is None and isinstance(fused.patch_embed, HybridPatchEmbed):
        stem: Any = fused.patch_embed.stem
        stem.to(memory_format=torch.channels_last)
    return fused.eval()


def _rebuilt(config: dict[str, Any]) -> nn.Module:
    """The image tower of open_clip's config of a CLIP, without its weights."""
    import open_clip

    text = {"context_length": 4, "vocab_size": 4, "width": 64, "heads": 1, "layers": 1}  # not needed
    with skip_init():
        return open_clip.CustomTextCLIP(**config, text_cfg=text).visual


def _has_own_kind(tower: VisionTower) -> bool:
    """Whether `FusedDCP` describes an image tower completely; it does for CLIP's own ViT."""
    if not (isinstance(tower, OpenClipViT) and tower.token_only):
        return False
    norms = (tower.visual.ln_post, *(norm for block in tower.blocks for norm in (block.module.ln_1, block.module.ln_2)))
    exact = all(getattr(block.module.mlp.gelu, "approximate", "none") == "none" for block in tower.blocks)
    return exact and all(norm.eps == 1e-5 for norm in norms)


def _config(model: Any) -> dict[str, Any]:
    visual, block = model.visual, model.vision_blocks[0]
    conv1, layers = visual.conv1, len(model.vision_blocks)
    patch_embed: dict[str, Any] | None
    if type(conv1) is nn.Conv2d:
        patch_embed = {
            "kind": "conv",
            "size": conv1.kernel_size,
            "stride": conv1.stride,
            "bias": conv1.bias is not None,
        }
    else:
        patch_embed = {"kind": "hybrid"} if type(conv1) is HybridPatchEmbed else None
    return {
        "patch_embed": patch_embed,  # None: another module
        "width": len(visual.class_embedding),
        "hidden": block.mlp.c_fc.out_features,
        "heads": block.attn.num_heads,
        "layers": layers,
        "tokens": len(visual.positional_embedding),
        "ln_pre": isinstance(visual.ln_pre, nn.LayerNorm),
        "activation": type(block.mlp.gelu).__name__,
        "n_ctx": model.n_ctx,
        "constant": _num_constant(model),
        "embed_dim": 0 if visual.proj is None else visual.proj.shape[1],
        "num_classes": model.num_classes,
    }


def _state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of the image tower by name."""
    visual, blocks = model.visual, model.vision_tower.blocks
    prompts = _prompts(model)
    state = {
        "class_embedding": visual.class_embedding,
        "positional_embedding": visual.positional_embedding,
        "prompts": prompts[-1],
        **_prefixed("ln_post", visual.ln_post),
        **(_prefixed("ln_pre", visual.ln_pre) if isinstance(visual.ln_pre, nn.LayerNorm) else {}),
        **({} if visual.proj is None else {"proj.weight": visual.proj.T}),
        **_prefixed("patch_embed", visual.conv1),
    }
    constant = _num_constant(model)
    for i, block in enumerate(model.vision_blocks):
        state |= {f"blocks.{i}.{name}": t for name, t in _block_state(block).items()}
        if i < constant:
            state[f"blocks.{i}.prompts"] = _constant(blocks[i], prompts[i], model.vision_tower.dtype)
    return state


def _constant(block: Block, prompts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Prompts (M, Dv) that enter a block -> their keys and values (2, H, M, d)."""
    return torch.stack(block.key_value(block.norm(prompts.to(dtype)), rotate=False))


def _prompts(model: Any) -> list[torch.Tensor]:
    """The prompts (M, Dv) that enter the first blocks; without any, M = 0."""
    tower = model.vision_tower
    return model.image_prompts() or [torch.zeros(0, tower.width, dtype=tower.dtype, device=model.device)]


def _num_constant(model: Any) -> int:
    """Blocks with constant prompts whose outputs are discarded: those before a block with new ones. In the last block
    only the pooled tokens are computed."""
    last, layers = len(_prompts(model)) - 1, len(model.vision_tower.blocks)
    return min(last + (last == layers - 1), layers)


def _fused_tower(model: Any) -> tuple[type[FusedDCP], dict[str, Any], dict[str, torch.Tensor]]:
    """Class, config and tensors of the image tower of a `FusedTower`."""
    prompts, tower, constant = _prompts(model), model.vision_tower, _num_constant(model)
    constants = torch.stack(
        [_constant(block, p, tower.dtype) for block, p in zip(tower.blocks[: constant or 1], prompts, strict=False)]
    )
    config = {
        "patch_embed": None,
        "open_clip": getattr(model.clip, "open_clip_config", None),
        "width": tower.width,
        "n_ctx": model.n_ctx,
        "constant": constant,
        "prompt_heads": list(constants.shape[2:]),
        "embed_dim": model.num_features,
        "num_classes": model.num_classes,
    }
    state = {"prompts": prompts[-1], "constants": constants[:constant], **_prefixed("visual", model.visual)}
    return FusedTower, config, state


def _shallow(module: nn.Module) -> nn.Module:
    """A copy of a module's structure that shares its tensors."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def _block_state(block: Any) -> dict[str, torch.Tensor]:
    """One block; the factors of QuickGELU, h * sigmoid(1.702 h) = silu(1.702 h) / 1.702, are folded into weights."""
    attn, mlp = block.attn, block.mlp
    d = attn.in_proj_weight.shape[1]
    quick = 1.702 if type(mlp.gelu).__name__ == "QuickGELU" else 1.0
    gamma_1, gamma_2 = (
        getattr(layer_scale, "gamma", attn.out_proj.bias.new_ones(1)) for layer_scale in (block.ls_1, block.ls_2)
    )
    return {
        **_prefixed("ln_1", block.ln_1),
        **_prefixed("ln_2", block.ln_2),
        "query.weight": attn.in_proj_weight[:d],
        "query.bias": attn.in_proj_bias[:d],
        "key_value.weight": attn.in_proj_weight[d:],
        "key_value.bias": attn.in_proj_bias[d:],
        "out.weight": attn.out_proj.weight * gamma_1[:, None],
        "out.bias": attn.out_proj.bias * gamma_1,
        "c_fc.weight": mlp.c_fc.weight * quick,
        "c_fc.bias": mlp.c_fc.bias * quick,
        "c_proj.weight": mlp.c_proj.weight * gamma_2[:, None] / quick,
        "c_proj.bias": mlp.c_proj.bias * gamma_2,
    }


def _prefixed(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{k}": t for k, t in module.state_dict().items()}


def _patch_embed(config: dict[str, Any]) -> nn.Module:
    spec = config["patch_embed"]
    if spec["kind"] == "hybrid":
        return HybridPatchEmbed(config["width"])
    return nn.Conv2d(3, config["width"], spec["size"], spec["stride"], bias=spec["bias"])


def _activation(config: dict[str, Any]) -> nn.Module:
    return nn.SiLU() if config["activation"] == "QuickGELU" else nn.GELU()
