"""The towers with every kind of CLIP and torch: open_clip's attention, unsupported CLIPs, compilers, no oneDNN."""

from collections.abc import Iterator

import pytest
import torch
from helpers import gradients, loud
from open_clip.transformer import Attention
from shared import build_tiny_clip
from torch import nn
from torch.nn import functional as F

from dcp_zoo import DCP, ZooError
from dcp_zoo.backbone import _torch
from dcp_zoo.backbone.towers.text import TextTower
from dcp_zoo.heads.config import COUPLINGS

NAMES = ["ant", "wild_cat", "crocodile head", "emu"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(clip: nn.Module, **options) -> DCP:
    torch.manual_seed(3)
    return loud(DCP(clip, NAMES, n_ctx=3, **options)).eval()


@pytest.fixture
def with_stats(tiny_clip) -> DCP:
    model = build(tiny_clip)
    model.store_stats(IMAGES)
    return model


def logits_and_gradients(model: DCP) -> dict[str, torch.Tensor]:
    logits = model.train()(IMAGES)
    return {"logits": logits} | gradients(model, logits)


# -------------------------------------------------------------------------------------------- open_clip's own attention


def blocks(clip: nn.Module) -> list[nn.Module]:
    return [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]


def with_own_attention(clip: nn.Module, **options) -> nn.Module:
    """The CLIP with `open_clip.transformer.Attention` in every block, as in open_clip 4, and the same weights."""
    for block in blocks(clip):
        attention = Attention(block.attn.embed_dim, block.attn.num_heads, **options)
        attention.load_state_dict(block.attn.state_dict(), strict=not options)
        block.attn = attention
    return clip.eval()


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_own_attention_gives_the_same(golden, coupling):
    own = with_own_attention(build_tiny_clip(golden))
    assert not any(hasattr(block.attn, "embed_dim") for block in blocks(own))
    expected, found = (logits_and_gradients(build(clip, coupling=coupling)) for clip in (build_tiny_clip(golden), own))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_other_kinds_of_attention_are_rejected(golden):
    with pytest.raises(ZooError, match=r"\(CLIP\): it needs no query-key normalisation \(qk_norm\)\. Any open_clip"):
        build(with_own_attention(build_tiny_clip(golden), qk_norm=True))
    clip = build_tiny_clip(golden)
    clip.transformer.resblocks[-1].mlp.add_module("ln", nn.LayerNorm(64))  # one block is enough
    with pytest.raises(ZooError, match=r"no normalisation inside attention \(inner_norm\)"):
        build(clip)
    clip.transformer.resblocks[-1].mlp.ln = nn.Identity()
    assert build(clip)(IMAGES).shape == (4, 4)


# ------------------------------------------------------------------------------------------------------------ compilers


@pytest.fixture
def short(golden) -> DCP:
    """A calibrated model of one block with prompts and one without: more are compiled like these, for seconds."""
    model = build(build_tiny_clip(golden, vision_cfg={"layers": 2}, text_cfg={"layers": 2}), depth=1)
    model.store_stats(IMAGES)
    return model


@torch.no_grad()
def test_compiled_models_read_no_texts(short, monkeypatch):
    """Texts are read once, between the graphs, as without a compiler."""
    short.text_probe = short._probe_of(short.classes, sum(sum(reading.widths) for reading in short.readings))
    expected = short(IMAGES)
    monkeypatch.setattr(short.encoder, "tokenizer", None)
    monkeypatch.setattr(TextTower, "begin", None)
    compiled = torch.compile(short, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), expected, atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    short.text_probe.bias += 1  # what a training changes has its effect
    torch.testing.assert_close(compiled(IMAGES), expected + 1, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_with_stats_model_exports_with_a_dynamic_batch(short):
    batch = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(short, (IMAGES,), dynamic_shapes=batch).module()
    for images in (IMAGES, IMAGES[:2]):
        torch.testing.assert_close(program(images), short(images), atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- oneDNN


@pytest.fixture
def products(monkeypatch) -> Iterator[list[int]]:
    """One entry per product computed by oneDNN. Its availability is checked again, before and after the test."""
    calls, onednn = [], _torch._onednn
    monkeypatch.setattr(_torch, "_onednn", lambda *args: calls.append(1) or onednn(*args))
    _torch._has_onednn.cache_clear()
    yield calls
    _torch._has_onednn.cache_clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_without_onednn_torchs_product_is_used(with_stats, monkeypatch, products):
    expected = with_stats(IMAGES), logits_and_gradients(with_stats)
    with_stats.eval()
    _torch._has_onednn.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    products.clear()
    found = with_stats(IMAGES), logits_and_gradients(with_stats)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not products
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    assert torch.equal(_torch.linear(x, weight), F.linear(x, weight))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.filterwarnings("ignore:TF32")
def test_onednn_is_used_if_available_and_can_be_disabled(products):
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    for _ in range(2):
        _torch.linear(x, weight)
    assert len(products) == 3  # the trial, once
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(_torch.linear(x, weight), F.linear(x, weight))
    assert len(products) == 3
    _torch.linear(x, weight)
    assert len(products) == 4
