"""The fused model: the logits of a model with stored statistics, and everything a plain module must support."""

import io
import shutil

import pytest
import torch
from helpers import close, loud
from PIL import Image
from shared import build_tiny_clip
from torch import nn

from dcp_zoo import DCP, ZooError, create_model, create_transform
from dcp_zoo.backbone.mini import HybridPatchEmbed
from dcp_zoo.heads.config import COUPLINGS

NAMES = ["ant", "wild_cat", "crocodile head", "emu"]
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def with_stats(model: DCP) -> DCP:
    """The model with scaled-up trained parameters, a nonzero statistics, and in eval mode."""
    loud(model).store_stats(2 * torch.randn(6, 3, *IMAGES.shape[2:]))
    return model.eval()


@pytest.fixture
def model(tiny_clip) -> DCP:
    return with_stats(DCP(tiny_clip, NAMES, n_ctx=3, depth=2))


@pytest.mark.parametrize(("coupling", "depth"), zip(COUPLINGS, [1, 99], strict=True))
@torch.no_grad()
def test_same_logits(tiny_clip, coupling, depth):
    """With any patch embedding, also after torch.save."""
    if depth == 1:
        tiny_clip.visual.conv1 = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 128, 2, 2))
    model = with_stats(DCP(tiny_clip, NAMES, n_ctx=3, depth=depth, coupling=coupling, share_cmpa=False))
    fused, file = model.fuse(), io.BytesIO()
    assert close(fused(IMAGES), model(IMAGES))
    assert close(fused.encode_image(IMAGES), model.encode_image(IMAGES))
    assert fused.classnames == NAMES
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IMAGES), fused(IMAGES))


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_cfg": {"layers": 6, "ls_init_value": 0.3}, "quick_gelu": False},
        {"text_cfg": {"layers": 6}, "vision_cfg": {"no_ln_pre": True}, "init_logit_bias": -3.0},
    ],
)
@torch.no_grad()
def test_other_clips(golden, changes):
    model = with_stats(DCP(build_tiny_clip(golden, **changes), NAMES, n_ctx=3))
    assert close(model.fuse()(IMAGES), model(IMAGES))


@torch.no_grad()
def test_miniature():
    model = create_model("dcp_mini", "clip", classnames=NAMES).eval()
    images = torch.randn(3, *model.pretrained_cfg["input_size"])
    model.store_stats(images)
    fused = model.fuse()
    assert isinstance(fused.visual.conv1, HybridPatchEmbed)
    photo = Image.effect_noise((250, 290), 60).convert("RGB")
    assert torch.equal(create_transform(fused)(photo), create_transform(model)(photo))
    assert close(fused(images), model(images))


def test_needs_a_calibrated_context(tiny_clip):
    with pytest.raises(ZooError, match="store_stats"):
        DCP(tiny_clip, NAMES, n_ctx=3).fuse()


@torch.no_grad()
def test_is_frozen_small_and_independent(model):
    fused, logits = model.fuse(), model(IMAGES)
    assert not any(p.requires_grad for p in fused.parameters())
    text = sum(p.numel() for p in model.encoder.text.transformer.parameters())
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.encoder.clip.parameters()) - text
    assert close(fused.half()(IMAGES.half()).float(), logits, 0.1)
    assert model.encoder.visual.class_embedding.dtype == torch.float32
    assert close(model(IMAGES), logits)
    model.set_classnames(["other"])
    assert fused(IMAGES.half()).shape == (3, 4)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.scripts)])
def test_compiles_as_a_full_graph(golden, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    two = {"layers": 2}  # inductor takes seconds per block
    fused = with_stats(DCP(build_tiny_clip(golden, vision_cfg=two, text_cfg=two), NAMES, n_ctx=3, depth=1)).fuse()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    assert close(compiled(IMAGES), fused(IMAGES))


@torch.no_grad()
def test_exports_with_a_dynamic_batch(model):
    fused = model.fuse()
    program = torch.export.export(fused, (IMAGES,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    for n in (1, 2, 3):
        assert close(program.module()(IMAGES[:n]), fused(IMAGES[:n]))
