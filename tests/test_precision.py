"""Features of images in bfloat16: where that is chosen, and what is kept of it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dcp_zoo.data.packaged import sample_images
from dcp_zoo.prediction import decode
from dcp_zoo.prediction.heads import HeadPredictor
from dcp_zoo.training.cache import kept_features
from dcp_zoo.training.device import pick_precision
from dcp_zoo.training.sources import image_source

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def multiplies(request, monkeypatch) -> bool:
    """A processor that multiplies bfloat16, and one that does not."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    return request.param


def test_auto_is_bfloat16_for_a_real_clip_where_the_processor_multiplies_it(multiplies):
    fast = "bfloat16" if multiplies else "float32"
    found = [pick_precision("auto", name, CPU) for name in ("dcp_vitb16", "open_clip:ViT-B-16/openai")]
    assert found == [fast, fast]
    assert [pick_precision("auto", name, CPU) for name in ("dcp_mini", "custom")] == ["float32"] * 2
    assert pick_precision("float32", "dcp_vitb16", CPU) == "float32"


def test_features_are_kept_by_their_precision(clip, photos):
    with kept_features():
        rounded = image_source(clip, photos, precision="bfloat16").features()
        exact = image_source(clip, photos).features()
    assert exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(exact, image_source(clip, photos).features())
    assert 0 < (exact - rounded).abs().max() < 0.02


def test_logits_are_those_of_rounded_features_exactly(tiny_head):
    """A classifier in bfloat16 would round logits, too."""
    pixels = np.stack([decode(path, tiny_head.pretrained_cfg) for path in sample_images()[:3]])
    found = HeadPredictor(tiny_head, features=True, precision="bfloat16").compute(pixels)
    features, (weight, bias) = torch.from_numpy(found.features), tiny_head.linear()
    torch.testing.assert_close(torch.from_numpy(found.logits), F.linear(features, weight, bias), rtol=1e-5, atol=1e-4)
    exact = HeadPredictor(tiny_head, features=True, precision="float32").compute(pixels)
    assert 0 < abs(exact.features - found.features).max() < 0.02
