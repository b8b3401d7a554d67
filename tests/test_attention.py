"""Where a head's tokens attend to: a plain softmax over all keys, for the tokens that the model itself computes."""

import pytest
import torch
from helpers import vision_blocks

from dcp_zoo import DCP, create_model
from dcp_zoo.api import attention_maps, attention_weights
from dcp_zoo.heads.config import COUPLINGS, STATS


@pytest.fixture(params=COUPLINGS)
def coupled(request, tiny_clip):
    torch.manual_seed(1)
    model = DCP(tiny_clip, ["cat", "dog"], n_ctx=3, depth=2, coupling=request.param).eval()
    model.store_stats(torch.randn(4, 3, 32, 32))
    return model


@pytest.mark.parametrize("stats", STATS)
def test_weights_equal_torchs_for_the_models_tokens(coupled, stats, monkeypatch):
    """Each block's weights as returned by `nn.MultiheadAttention`, for tokens that lead to the model's features."""
    model = coupled
    model.stats = stats
    images = torch.randn(2, 3, 32, 32)
    inputs, block_of = [], model.encoder.vision_tower.block

    def record(i, x, *args):
        inputs.append(x)
        return block_of(i, x, *args)

    expected_features = model.encode_image(images)
    monkeypatch.setattr(model.encoder.vision_tower, "block", record)
    weights = attention_weights(model, images)
    tokens = 1 + 16 + 3
    assert weights.shape == (2, 4, 4, tokens)
    queries = [0, *range(tokens - 3, tokens)]
    for i, (block, x) in enumerate(zip(vision_blocks(model), inputs, strict=True)):
        normed = block.ln_1(x)
        expected = block.attn(normed, normed, normed, need_weights=True)[1]
        torch.testing.assert_close(weights[:, i], expected[:, queries])
    x = block_of(3, inputs[-1])
    features = torch.nn.functional.normalize(model.encoder.visual.ln_post(x[:, 0]) @ model.encoder.visual.proj, dim=-1)
    torch.testing.assert_close(features, expected_features)


def test_maps_have_the_shape_of_the_image():
    model = create_model("dcp_mini", classnames=["cat", "dog"], n_ctx=2).eval()
    images = torch.randn(1, 3, 192, 192)
    maps, weights = attention_maps(model, images), attention_weights(model, images)
    assert maps.shape == (1, 6, 3, 6, 6)
    torch.testing.assert_close(maps[0, 2, 1, 3, 4], weights[0, 2, 1, 1 + 3 * 6 + 4])  # row by row
